// Transport family: alternating scalings of a kernel in memory, V to U to V, with nothing that waits for the host.
//
// In come kernels, the offsets in them, V and both sides; out go potentials, scalings, sums and ceilings behind `count`
// iterations. A matrix of some size takes a kernel for its rows, one for its columns and one that puts together what
// the columns' chunks found; where a side has a ceiling, and where the potentials are shifted, a block for each problem
// does that behind them. Small matrices have a block each that does all iterations.
#pragma once

#include "transport_entries.cuh"
#include "transport_sides.cuh"

namespace counterpoise::cuda {

constexpr int transport_problem_threads = 512;  // of a block that has a problem for itself

// All problems of a batch, one behind the other.
template <class T>
struct Scalings {
  const T *kernel, *f0, *g0;
  Side<T> rows, columns;
  T *f, *g, *u, *v, *s, *r;
  TransportShape shape;
  double epsilon, shift_length;
  bool shift;
};

// A row's sum, and what follows from it unless a ceiling has to be found first.
template <class T>
CP_DEVICE void settle_row(const Scalings<T>& p, int64_t problem, int64_t i, T sum, bool potentials) {
  p.r[problem * p.shape.rows + i] = sum;
  if (p.rows.ceiling == nullptr)
    settle(p.rows, problem, i, sum, p.f0, math::infinity<T>, p.u, potentials ? p.f : nullptr);
}

template <class T>
CP_DEVICE void settle_column(const Scalings<T>& p, int64_t problem, int64_t j, T sum, bool potentials) {
  p.s[problem * p.shape.columns + j] = sum;
  if (p.columns.ceiling == nullptr)
    settle(p.columns, problem, j, sum, p.g0, math::infinity<T>, p.v, potentials ? p.g : nullptr);
}

template <class T>
CP_DEVICE void settle_rows(const Scalings<T>& p, int64_t problem, bool potentials, SideScratch<T>& scratch) {
  block_settle(p.rows, problem, p.r, p.f0, p.u, potentials ? p.f : nullptr, scratch);
}

template <class T>
CP_DEVICE void settle_columns(const Scalings<T>& p, int64_t problem, bool potentials, SideScratch<T>& scratch) {
  block_settle(p.columns, problem, p.s, p.g0, p.v, potentials ? p.g : nullptr, scratch);
}

// Moves a problem's potentials by their best common shift, and with them what is scaled; by all threads of a block.
template <class T>
CP_DEVICE void block_shift(const Scalings<T>& p, int64_t problem, SideScratch<T>& scratch) {
  const double of_rows = block_log_mass(p.rows, problem, p.f, scratch);
  const double of_columns = block_log_mass(p.columns, problem, p.g, scratch);
  const T c = math::common_shift<T>(p.shift_length, of_rows, of_columns);
  const T up = static_cast<T>(math::exp(static_cast<double>(c) / p.epsilon));
  const int64_t n = p.shape.rows, k = p.shape.columns;
  for (int64_t i = problem * n + threadIdx.x; i < (problem + 1) * n; i += blockDim.x) {
    p.f[i] += c;
    p.u[i] *= up;
  }
  for (int64_t j = problem * k + threadIdx.x; j < (problem + 1) * k; j += blockDim.x) {
    p.g[j] -= c;
    p.v[j] /= up;
    p.s[j] *= up;
  }
}

// A thread's part of sum_j K_ij v_j: N columns at a time, from `first` on.
template <class T, int N>
CP_DEVICE T product(const T* row, const T* v, int64_t columns, int64_t first, int64_t step) {
  T sum = 0;
#pragma unroll 4
  for (int64_t j = first * N; j < columns; j += step * N) {
    T entry[N], weight[N];
    load_pack(row + j, entry);
    load_pack(v + j, weight);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += entry[k] * weight[k];
  }
  return sum;
}

// ---- a kernel for each half -------------------------------------------------------------------------------------

// r of every row, and u; N columns at a time, by `lanes` neighbours or (Long) by a block.
template <class T, int N, bool Long>
__global__ void __launch_bounds__(transport_threads)
    transport_products_kernel(Scalings<T> p, int lanes, bool potentials) {
  __shared__ T scratch[warp_size];
  const int width = Long ? transport_threads : lanes, together = transport_threads / width;
  const int first = static_cast<int>(threadIdx.x) % width;
  const int64_t n = p.shape.rows, k = p.shape.columns, rows = p.shape.problems * n;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * together; begin < rows;
       begin += static_cast<int64_t>(gridDim.x) * together) {
    const int64_t row = begin + static_cast<int>(threadIdx.x) / width, problem = p.shape.problem(row);
    T sum = row < rows ? product<T, N>(p.kernel + row * k, p.v + problem * k, k, first, width) : T(0);
    sum = Long ? block_reduce(sum, Add(), scratch) : warp_reduce(sum, Add(), lanes);
    if (first == 0 && row < rows) settle_row(p, problem, row - problem * n, sum, potentials);
  }
}

// s of every column from its chunks, and v.
template <class T>
__global__ void __launch_bounds__(transport_threads)
    transport_sums_kernel(Scalings<T> p, const T* parts, int64_t chunks, bool potentials) {
  __shared__ T scratch[transport_warps][warp_size];
  const int64_t k = p.shape.columns, strips = (k + warp_size - 1) / warp_size;
  for (int64_t job = blockIdx.x; job < p.shape.problems * strips; job += gridDim.x) {
    const int64_t problem = job / strips, j = job % strips * warp_size + lane();
    const T sum = merged_chunks(parts, SumDown<T>{}, problem, chunks, k, j, scratch);
    if (warp() == 0 && j < k) settle_column(p, problem, j, sum, potentials);
  }
}

// Of rows or columns with a ceiling.
template <class T, bool Rows>
__global__ void __launch_bounds__(transport_problem_threads, 1) transport_level_kernel(Scalings<T> p, bool potentials) {
  __shared__ SideScratch<T> scratch;
  for (int64_t problem = blockIdx.x; problem < p.shape.problems; problem += gridDim.x) {
    if constexpr (Rows) {
      settle_rows(p, problem, potentials, scratch);
    } else {
      settle_columns(p, problem, potentials, scratch);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(transport_problem_threads, 1) transport_shift_kernel(Scalings<T> p) {
  __shared__ SideScratch<T> scratch;
  for (int64_t problem = blockIdx.x; problem < p.shape.problems; problem += gridDim.x) block_shift(p, problem, scratch);
}

// ---- a block for each problem -----------------------------------------------------------------------------------
//
// What one thread writes others read behind a barrier, in global memory that the block's own cache holds.

// r of all rows, each by `lanes` neighbours, and u.
template <class T>
CP_DEVICE void rows_by_block(const Scalings<T>& p, int64_t problem, int lanes, bool potentials,
                             SideScratch<T>& scratch) {
  const int64_t n = p.shape.rows, k = p.shape.columns;
  const int first = static_cast<int>(threadIdx.x) % lanes, together = transport_problem_threads / lanes;
  for (int64_t begin = 0; begin < n; begin += together) {
    const int64_t i = begin + static_cast<int>(threadIdx.x) / lanes, row = problem * n + i;
    T sum = i < n ? product<T, 1>(p.kernel + row * k, p.v + problem * k, k, first, lanes) : T(0);
    sum = warp_reduce(sum, Add(), lanes);
    if (first == 0 && i < n) p.r[row] = sum;
  }
  __syncthreads();
  if (p.rows.ceiling != nullptr) {
    settle_rows(p, problem, potentials, scratch);
  } else {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) settle_row(p, problem, i, p.r[problem * n + i], potentials);
  }
  __syncthreads();
}

// s of all columns, `width` at a time, between groups of threads that share the rows; and v.
template <class T>
CP_DEVICE void columns_by_block(const Scalings<T>& p, int64_t problem, int width, bool potentials, T* parts,
                                SideScratch<T>& scratch) {
  const int64_t n = p.shape.rows, k = p.shape.columns;
  const T *kernel = p.kernel + problem * n * k, *u = p.u + problem * n;
  const int groups = transport_problem_threads / width, own = static_cast<int>(threadIdx.x) % width;
  for (int64_t begin = 0; begin < k; begin += width) {
    const int64_t j = begin + own;
    T sum = 0;
    if (j < k) {
#pragma unroll 4
      for (int64_t i = static_cast<int>(threadIdx.x) / width; i < n; i += groups) sum += u[i] * kernel[i * k + j];
    }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width && j < k) {
      for (int g = 1; g < groups; ++g) sum += parts[g * width + own];
      settle_column(p, problem, j, sum, potentials);
    }
    __syncthreads();
  }
  if (p.columns.ceiling == nullptr) return;
  settle_columns(p, problem, potentials, scratch);
  __syncthreads();
}

// All iterations of a problem.
template <class T>
__global__ void __launch_bounds__(transport_problem_threads, 2)
    transport_problem_kernel(Scalings<T> p, int lanes, int width, int64_t count) {
  __shared__ SideScratch<T> scratch;
  __shared__ T parts[transport_problem_threads];
  for (int64_t problem = blockIdx.x; problem < p.shape.problems; problem += gridDim.x) {
#pragma unroll 1
    for (int64_t turn = 0; turn < count; ++turn) {
      const bool potentials = p.shift || turn + 1 == count;
      rows_by_block(p, problem, lanes, potentials, scratch);
      columns_by_block(p, problem, width, potentials, parts, scratch);
      if (!p.shift) continue;
      block_shift(p, problem, scratch);
      __syncthreads();
    }
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------

inline TransportShape transport_shape(const TransportScalings& p, int64_t problems) {
  return {problems, p.rows.size, p.columns.size};
}

// Whether a block does all iterations of a problem: its matrix stays in the block's cache, and launches would take
// longer.
inline bool transport_by_problem(const TransportShape& p) {
  constexpr int64_t entries = 1 << 14, longest = 1 << 11;
  return p.rows <= longest && p.columns <= longest && p.rows * p.columns <= entries;
}

// How many numbers the iterations need beside what they are given.
inline int64_t transport_scale_room(const TransportShape& p) {
  if (transport_by_problem(p)) return 0;
  return p.problems * transport_chunks(p.rows, p.columns).count * p.columns;
}

template <class T>
Scalings<T> scalings_of(const TransportScalings& p, int64_t problems) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  const auto out = [](void* x) { return static_cast<T*>(x); };
  return {at(p.kernel),
          at(p.f0),
          at(p.g0),
          side_of<T>(p.rows, p.epsilon),
          side_of<T>(p.columns, p.epsilon),
          out(p.f),
          out(p.g),
          out(p.u),
          out(p.v),
          out(p.s),
          out(p.r),
          transport_shape(p, problems),
          p.epsilon,
          p.shift_length,
          p.rows.log_exact != nullptr};
}

template <class T>
void transport_products_on(const Scalings<T>& p, bool potentials, void* stream) {
  constexpr int width = pack_width<T>;
  const TransportShape& shape = p.shape;
  const bool by_block = shape.columns >= transport_long_row, packs = transport_packs<T>(shape, p.kernel, p.v);
  const int lanes = transport_lanes(packs ? shape.columns / width : shape.columns);
  const int64_t together = by_block ? 1 : transport_threads / lanes;
  const auto kernel =
      by_block ? (packs ? transport_products_kernel<T, width, true> : transport_products_kernel<T, 1, true>)
               : (packs ? transport_products_kernel<T, width, false> : transport_products_kernel<T, 1, false>);
  const int64_t blocks = transport_grid((shape.problems * shape.rows + together - 1) / together);
  launch(kernel, {blocks, transport_threads, stream}, p, lanes, potentials);
}

// One iteration.
template <class T>
void transport_turn_on(const Scalings<T>& p, bool potentials, T* parts, void* stream) {
  const TransportShape& shape = p.shape;
  const Launch by_problem = {transport_grid(shape.problems), transport_problem_threads, stream};
  transport_products_on(p, potentials, stream);
  if (p.rows.ceiling != nullptr) launch(transport_level_kernel<T, true>, by_problem, p, potentials);
  const TransportChunks chunks = transport_chunks(shape.rows, shape.columns);
  transport_down_on<T>(shape, chunks, p.kernel, SumDown<T>{p.u}, parts, stream);
  const int64_t strips = (shape.columns + warp_size - 1) / warp_size;
  launch(transport_sums_kernel<T>, {transport_grid(shape.problems * strips), transport_threads, stream}, p,
         static_cast<const T*>(parts), chunks.count, potentials);
  if (p.columns.ceiling != nullptr) launch(transport_level_kernel<T, false>, by_problem, p, potentials);
  if (p.shift) launch(transport_shift_kernel<T>, by_problem, p);
}

template <class T>
void transport_turns_on(const Scalings<T>& p, int64_t count, T* parts, void* stream) {
  for (int64_t turn = 0; turn < count; ++turn) transport_turn_on(p, p.shift || turn + 1 == count, parts, stream);
}

template <class T>
void transport_problems_on(const Scalings<T>& p, int64_t count, void* stream) {
  const int64_t n = p.shape.rows, k = p.shape.columns;
  int lanes = transport_lanes(k), width = 1;
  while (lanes > 8 && lanes * n > transport_problem_threads) lanes /= 2;  // eight read 32 bytes or more of a row
  while (width < transport_problem_threads && width < k) width *= 2;
  launch(transport_problem_kernel<T>, {transport_grid(p.shape.problems), transport_problem_threads, stream}, p, lanes,
         width, count);
}

// Everything of `given` for all problems, v as it is before the first iteration; `parts` as transport_scale_room says.
template <class T>
void transport_scale_on(const TransportScalings& given, int64_t problems, void* parts, void* stream) {
  const Scalings<T> p = scalings_of<T>(given, problems);
  if (p.shape.entries() == 0 || given.count <= 0) return;
  if (transport_by_problem(p.shape)) {
    transport_problems_on(p, given.count, stream);
  } else {
    transport_turns_on(p, given.count, static_cast<T*>(parts), stream);
  }
}

}  // namespace counterpoise::cuda

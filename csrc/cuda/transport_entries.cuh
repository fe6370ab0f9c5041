// Transport family: what reads a matrix in memory entry by entry. The kernel of a cost, the plan of a kernel, where the
// iterations start, and (for the iterations too) what becomes of each column.
//
// Rows belong to warps or blocks, columns to lanes that go down some of the rows, as in transport.cuh; what the blocks
// that share a column found is put together in a second kernel, always in the same order.
#pragma once

#include "transport.cuh"

namespace counterpoise::cuda {

// Matrices of one shape, one behind the other.
struct TransportShape {
  int64_t problems, rows, columns;
  int64_t entries() const { return problems * rows * columns; }
  // Of a row that is counted through all problems; a division takes as long as a short row.
  CP_DEVICE int64_t problem(int64_t row) const { return problems == 1 ? 0 : row / rows; }
};

// ---- entry by entry ---------------------------------------------------------------------------------------------

// exp((g_j - C_ij + f_i) / epsilon), 0 where it would be subnormal.
template <class T>
struct KernelEntries {
  const T *f, *g;
  T by;
  CP_DEVICE T row(int64_t row) const { return f[row]; }
  template <int N>
  CP_DEVICE void operator()(T offset, int64_t column, T (&x)[N]) const {
    T inner[N];
    load_pack(g + column, inner);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T y = math::exp((inner[k] - x[k] + offset) * by);
      x[k] = y < std::numeric_limits<T>::min() ? T(0) : y;
    }
  }
};

// K_ij u_i v_j.
template <class T>
struct PlanEntries {
  const T *u, *v;
  CP_DEVICE T row(int64_t row) const { return u[row]; }
  template <int N>
  CP_DEVICE void operator()(T scaling, int64_t column, T (&x)[N]) const {
    T inner[N];
    load_pack(v + column, inner);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = x[k] * scaling * inner[k];
  }
};

// `to` may be `from`: a pack is read and written by one thread. Many threads are what hides the time of a load.
template <class T, int N, bool Long, class Entries>
__global__ void __launch_bounds__(transport_threads)
    transport_entries_kernel(const T* from, Entries entries, TransportShape p, T* to) {
  const RowTeam team = row_team<Long>();
  for (int64_t row = team.row; row < p.problems * p.rows; row += team.rows) {
    const auto of_row = entries.row(row);
    const int64_t column = p.problem(row) * p.columns;
    const T* in = from + row * p.columns;
    T* out = to + row * p.columns;
#pragma unroll 1
    for (int64_t j = team.first * N; j < p.columns; j += team.step * N) {
      T x[N];
      load_pack(in + j, x);
      entries(of_row, column + j, x);
      store_pack(x, out + j);
    }
  }
}

// ---- down the columns -------------------------------------------------------------------------------------------

// sum_i u_i K_ij.
template <class T>
struct SumDown {
  const T* u;
  CP_DEVICE T none() const { return T(0); }
  CP_DEVICE T row(int64_t row) const { return u[row]; }
  CP_DEVICE void take(T& to, T entry, T of_row) const { to += of_row * entry; }
  CP_DEVICE T both(T a, T b) const { return a + b; }
};

// min_i C_ij - f_i over rows with mass; of the others f_i counts as minus infinity, and NaN as nothing.
template <class T>
struct LeastDown {
  const T *f, *mass;
  CP_DEVICE T none() const { return math::infinity<T>; }
  CP_DEVICE T row(int64_t row) const { return mass[row] == 0 ? -math::infinity<T> : f[row]; }
  CP_DEVICE void take(T& to, T entry, T of_row) const { to = both(to, entry - of_row); }
  CP_DEVICE T both(T a, T b) const { return b < a ? b : a; }
};

// Rows [chunk * step, ...) of a problem; `lanes` neighbours take N columns each, and the groups of lanes of a block
// share the rows. parts is (problems, chunks, columns).
template <class T, int N, class Down>
__global__ void __launch_bounds__(transport_threads)
    transport_down_kernel(const T* matrix, Down down, TransportShape p, TransportChunks chunks, int lanes, T* parts) {
  __shared__ T scratch[transport_threads * N];
  const int64_t strip = static_cast<int64_t>(lanes) * N, strips = (p.columns + strip - 1) / strip;
  const int groups = transport_threads / lanes, group = static_cast<int>(threadIdx.x) / lanes;
  for (int64_t job = blockIdx.x; job < p.problems * chunks.count * strips; job += gridDim.x) {
    const int64_t part = job / strips, chunk = part % chunks.count, row = part / chunks.count * p.rows;
    const int64_t begin = job % strips * strip, j = begin + threadIdx.x % lanes * N;
    const int64_t end = (chunk + 1) * chunks.step < p.rows ? (chunk + 1) * chunks.step : p.rows;
    T found[N];
#pragma unroll
    for (int k = 0; k < N; ++k) found[k] = down.none();
    if (j < p.columns) {
#pragma unroll 4
      for (int64_t i = row + chunk * chunks.step + group; i < row + end; i += groups) {
        T entry[N];
        load_pack(matrix + i * p.columns + j, entry);
        const T of_row = down.row(i);
#pragma unroll
        for (int k = 0; k < N; ++k) down.take(found[k], entry[k], of_row);
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) scratch[threadIdx.x * N + k] = found[k];
    __syncthreads();
    for (int at = threadIdx.x; at < strip; at += blockDim.x) {
      T all = scratch[at];
      for (int g = 1; g < groups; ++g) all = down.both(all, scratch[g * strip + at]);
      if (begin + at < p.columns) parts[part * p.columns + begin + at] = all;
    }
    __syncthreads();
  }
}

// What the chunks found of 32 neighbouring columns, for lanes of the first warp; all threads of a block take part.
template <class T, class Down>
CP_DEVICE T merged_chunks(const T* parts, const Down& down, int64_t problem, int64_t chunks, int64_t columns, int64_t j,
                          T (&scratch)[transport_warps][warp_size]) {
  T all = down.none();
  if (j < columns) {
#pragma unroll 4
    for (int64_t chunk = warp(); chunk < chunks; chunk += warps())
      all = down.both(all, parts[(problem * chunks + chunk) * columns + j]);
  }
  scratch[warp()][lane()] = all;
  __syncthreads();
  all = scratch[0][lane()];
  for (int w = 1; w < transport_warps; ++w) all = down.both(all, scratch[w][lane()]);
  __syncthreads();
  return all;
}

// ---- where the iterations start ---------------------------------------------------------------------------------

// The largest of -C_ij and the largest finite C_ij of a row.
struct Extremes {
  template <class X>
  static CP_DEVICE X none() {
    return {-math::infinity<decltype(X::first)>, -math::infinity<decltype(X::first)>};
  }
  template <class T>
  CP_DEVICE Two<T> operator()(Two<T> a, Two<T> b) const {
    return {Larger()(a.first, b.first), a.second > b.second ? a.second : b.second};
  }
};

// f_i = min_j C_ij over columns with mass, and how far the row reaches above it.
template <class T, int N, bool Long>
__global__ void __launch_bounds__(transport_threads)
    transport_lowest_kernel(const T* cost, const T* column_mass, TransportShape p, T* f, T* reach) {
  __shared__ Two<T> scratch[warp_size];
  const RowTeam team = row_team<Long>();
  for (int64_t row = team.row; row < p.problems * p.rows; row += team.rows) {
    auto found = Extremes::none<Two<T>>();
    const int64_t column = p.problem(row) * p.columns;
    for (int64_t j = team.first * N; j < p.columns; j += team.step * N) {
      T entry[N], mass[N];
      load_pack(cost + row * p.columns + j, entry);
      load_pack(column_mass + column + j, mass);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const T seen = mass[k] == 0 ? entry[k] + math::infinity<T> : entry[k];
        found = Extremes()(found, Two<T>{-seen, entry[k] < math::infinity<T> ? entry[k] : -math::infinity<T>});
      }
    }
    found = Long ? block_reduce(found, Extremes(), scratch) : warp_reduce(found, Extremes());
    if (team.first == 0) {
      const T above = found.second + found.first;
      f[row] = -found.first;
      reach[row] = above > 0 && above < math::infinity<T> ? above : T(0);
    }
  }
}

// g of 32 columns a block, and the largest reach of a problem's rows.
template <class T>
__global__ void __launch_bounds__(transport_threads)
    transport_start_kernel(const T* parts, const T* reach, TransportShape p, int64_t chunks, T* g, double* spread) {
  __shared__ T scratch[transport_warps][warp_size];
  __shared__ T tops[warp_size];
  const int64_t strips = (p.columns + warp_size - 1) / warp_size;
  for (int64_t job = blockIdx.x; job < p.problems * strips; job += gridDim.x) {
    const int64_t problem = job / strips, j = job % strips * warp_size + lane();
    const T low = merged_chunks(parts, LeastDown<T>{}, problem, chunks, p.columns, j, scratch);
    if (warp() == 0 && j < p.columns) g[problem * p.columns + j] = low;
    if (job % strips != 0) continue;
    T top = 0;
    for (int64_t i = threadIdx.x; i < p.rows; i += blockDim.x) top = Larger()(top, reach[problem * p.rows + i]);
    top = block_reduce(top, Larger(), tops);
    if (threadIdx.x == 0) spread[problem] = static_cast<double>(top);
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Neighbours that share `packs` packs of a row, two or more each: a power of two of at most 32.
inline int transport_lanes(int64_t packs) {
  int lanes = 1;
  while (lanes < warp_size && 2 * lanes < packs) lanes *= 2;
  return lanes;
}

template <class T>
bool transport_packs(const TransportShape& p, const void* matrix, const void* of_columns) {
  return takes_packs<T, pack_width<T>>(matrix, p.columns) && takes_packs<T, pack_width<T>>(of_columns);
}

template <class T, class Entries>
void transport_entries_on(const TransportShape& p, const T* from, const Entries& entries, const T* of_columns, T* to,
                          void* stream) {
  if (p.entries() == 0) return;
  constexpr int width = pack_width<T>;
  const bool by_block = p.columns >= transport_long_row;
  const bool packs = transport_packs<T>(p, from, of_columns) && takes_packs<T, width>(to);
  const auto kernel = by_block ? (packs ? transport_entries_kernel<T, width, true, Entries>
                                        : transport_entries_kernel<T, 1, true, Entries>)
                               : (packs ? transport_entries_kernel<T, width, false, Entries>
                                        : transport_entries_kernel<T, 1, false, Entries>);
  launch(kernel, {transport_row_grid(p.problems * p.rows, by_block), transport_threads, stream}, from, entries, p, to);
}

// The kernel (problems, rows, columns) of a cost.
template <class T>
void transport_kernel_on(const TransportShape& p, double epsilon, const void* cost, const void* f, const void* g,
                         void* kernel, void* stream) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  transport_entries_on<T>(p, at(cost), KernelEntries<T>{at(f), at(g), static_cast<T>(1 / epsilon)}, at(g),
                          static_cast<T*>(kernel), stream);
}

// The plan in the place of its kernel.
template <class T>
void transport_plan_on(const TransportShape& p, void* kernel, const void* u, const void* v, void* stream) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  transport_entries_on<T>(p, at(kernel), PlanEntries<T>{at(u), at(v)}, at(v), static_cast<T*>(kernel), stream);
}

// parts (problems, chunks, columns) of what `down` makes of the columns.
template <class T, class Down>
void transport_down_on(const TransportShape& p, const TransportChunks& chunks, const T* matrix, const Down& down,
                       T* parts, void* stream) {
  constexpr int width = pack_width<T>;
  const bool packs = takes_packs<T, width>(matrix, p.columns);
  const int64_t taken = packs ? p.columns / width : p.columns;
  int lanes = warp_size;
  while (lanes > 1 && lanes / 2 >= taken) lanes /= 2;
  const int64_t strip = lanes * (packs ? width : 1), strips = (p.columns + strip - 1) / strip;
  const int64_t blocks = transport_grid(p.problems * chunks.count * strips);
  launch(packs ? transport_down_kernel<T, width, Down> : transport_down_kernel<T, 1, Down>,
         {blocks, transport_threads, stream}, matrix, down, p, chunks, lanes, parts);
}

// f (problems, rows), g (problems, columns) and the spread (problems); `parts` holds problems * chunks * columns
// numbers, `reach` problems * rows.
template <class T>
void transport_start_on(const TransportShape& p, const void* cost, const void* row_mass, const void* column_mass,
                        void* parts, void* reach, void* f, void* g, void* spread, void* stream) {
  if (p.entries() == 0) return;
  constexpr int width = pack_width<T>;
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  const auto out = [](void* x) { return static_cast<T*>(x); };
  const bool by_block = p.columns >= transport_long_row, packs = transport_packs<T>(p, cost, column_mass);
  const auto kernel =
      by_block ? (packs ? transport_lowest_kernel<T, width, true> : transport_lowest_kernel<T, 1, true>)
               : (packs ? transport_lowest_kernel<T, width, false> : transport_lowest_kernel<T, 1, false>);
  launch(kernel, {transport_row_grid(p.problems * p.rows, by_block), transport_threads, stream}, at(cost),
         at(column_mass), p, out(f), out(reach));
  const TransportChunks chunks = transport_chunks(p.rows, p.columns);
  transport_down_on<T>(p, chunks, at(cost), LeastDown<T>{at(f), at(row_mass)}, out(parts), stream);
  const int64_t strips = (p.columns + warp_size - 1) / warp_size;
  launch(transport_start_kernel<T>, {transport_grid(p.problems * strips), transport_threads, stream}, at(parts),
         at(reach), p, chunks.count, out(g), static_cast<double*>(spread));
}

}  // namespace counterpoise::cuda

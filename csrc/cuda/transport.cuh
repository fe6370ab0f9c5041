// Transport family: sums of exp((g_j - C_ij + f_i) / epsilon) over columns and over rows, without a kernel in memory.
//
// A row belongs to a warp, or to a block where it is long. Columns belong to lanes, which go down some of the rows; what
// they found is merged in shared memory, and over the blocks that share a column in a second kernel, always in the same
// order. Largest exponents are found on the way: each entry of the cost is read once and takes one exponential.
#pragma once

#include "../cpu/transport.h"
#include "../math/transport.h"
#include "block.cuh"

namespace counterpoise::cuda {

constexpr int transport_threads = 256;
constexpr int transport_warps = transport_threads / warp_size;
constexpr int64_t transport_long_row = 2048;      // entries from which on a row takes a block
constexpr int64_t transport_most_blocks = 1 << 16;  // a larger grid goes round
constexpr int64_t transport_most_chunks = 128;    // of rows, that share a column

// Problems of one shape, one behind the other.
template <class T>
struct TransportCosts {
  const T *cost, *of_row, *of_column, *g;  // of_row, of_column null = the cost is given
  int64_t problems, rows, columns;
  T by;  // 1 / epsilon
};

// A sum of weights times exponentials relative to the largest, `top`, which is in units of the cost.
template <class T>
struct RelativeSum {
  T top, sum;
};

template <class T>
CP_DEVICE RelativeSum<T> across(RelativeSum<T> x, int distance) {
  return {across(x.top, distance), across(x.sum, distance)};
}

template <class T>
struct Join {
  T by;
  template <class X>
  static CP_DEVICE X none() {
    return {std::numeric_limits<T>::lowest(), T(0)};
  }
  CP_DEVICE void take(RelativeSum<T>& to, T x, T weight) const {
    const bool larger = x > to.top;
    const T e = math::exp((larger ? to.top - x : x - to.top) * by);
    to.sum = larger ? to.sum * e + weight : to.sum + weight * e;
    to.top = larger ? x : to.top;
  }
  template <bool Logs>
  CP_DEVICE RelativeSum<T> both(RelativeSum<T> a, RelativeSum<T> b) const {
    if constexpr (Logs) return (*this)(a, b);
    return {T(0), a.sum + b.sum};
  }
  CP_DEVICE RelativeSum<T> operator()(RelativeSum<T> a, RelativeSum<T> b) const {
    const bool first = a.top >= b.top;
    const RelativeSum<T> high = first ? a : b, low = first ? b : a;
    return {high.top, high.sum + low.sum * math::exp((low.top - high.top) * by)};
  }
};

// g_j - C_ij of N neighbouring columns from j on; `row` counts through all problems.
template <int N, class T>
CP_DEVICE void above_cost(const TransportCosts<T>& p, int64_t row, int64_t j, T (&x)[N]) {
  T cost[N], g[N];
  const int64_t at = row / p.rows * p.columns + j;
  load_pack(p.cost + row * p.columns + j, cost);
  load_pack(p.g + at, g);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T entry = p.of_row == nullptr ? cost[k]
                                        : math::transport_cost<true>(cost[k], p.of_row[row], p.of_column[at + k]);
    x[k] = g[k] - entry;
  }
}

// Rows that a warp or (Long) a block takes: `row`, and so many ahead the next; its threads count from `first` on.
struct RowTeam {
  int64_t row, rows, first, step;
};

template <bool Long>
CP_DEVICE RowTeam row_team() {
  if constexpr (Long) return {blockIdx.x, gridDim.x, threadIdx.x, blockDim.x};
  return {static_cast<int64_t>(blockIdx.x) * warps() + warp(), static_cast<int64_t>(gridDim.x) * warps(), lane(),
          warp_size};
}

// f and r of every row; N columns at a time, a warp or (Long) a block to a row.
template <class T, int N, bool Long>
__global__ void __launch_bounds__(transport_threads)
    transport_rows_kernel(TransportCosts<T> p, const T* v, T* f, T* r) {
  __shared__ RelativeSum<T> scratch[warp_size];
  const Join<T> join{p.by};
  const RowTeam team = row_team<Long>();
  for (int64_t row = team.row; row < p.problems * p.rows; row += team.rows) {
    RelativeSum<T> found = Join<T>::template none<RelativeSum<T>>();
    for (int64_t j = team.first * N; j < p.columns; j += team.step * N) {
      T x[N], weight[N];
      above_cost(p, row, j, x);
      load_pack(v + row / p.rows * p.columns + j, weight);
#pragma unroll
      for (int k = 0; k < N; ++k) join.take(found, x[k], weight[k]);
    }
    found = Long ? block_reduce(found, join, scratch) : warp_reduce(found, join);
    if (team.first == 0) {
      f[row] = -found.top;
      r[row] = found.sum;
    }
  }
}

// Rows [chunk * step, ...) of a problem; each warp of a block takes every eighth of them, each lane N columns.
template <class T, int N, bool Logs>
__global__ void __launch_bounds__(transport_threads)
    transport_columns_kernel(TransportCosts<T> p, const T* f, const T* u, int64_t chunks, int64_t step,
                             RelativeSum<T>* parts) {
  __shared__ RelativeSum<T> scratch[transport_warps][warp_size * N];
  const Join<T> join{T(1)};
  const int64_t strips = (p.columns + warp_size * N - 1) / (warp_size * N);
  for (int64_t job = blockIdx.x; job < p.problems * chunks * strips; job += gridDim.x) {
    const int64_t problem = job / (chunks * strips), chunk = job / strips % chunks;
    const int64_t j = job % strips * warp_size * N + lane() * N;
    const int64_t end = (chunk + 1) * step < p.rows ? (chunk + 1) * step : p.rows;
    RelativeSum<T> found[N];
#pragma unroll
    for (int k = 0; k < N; ++k) found[k] = Logs ? Join<T>::template none<RelativeSum<T>>() : RelativeSum<T>{T(0), T(0)};
    for (int64_t i = chunk * step + warp(); i < end && j < p.columns; i += warps()) {
      const int64_t row = problem * p.rows + i;
      T x[N];
      above_cost(p, row, j, x);
      const T offset = f[row], weight = u[row];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const T exponent = (x[k] + offset) * p.by;
        if constexpr (Logs) {
          join.take(found[k], exponent + weight, T(1));
        } else {
          found[k].sum += weight * math::exp(exponent);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) scratch[warp()][lane() * N + k] = found[k];
    __syncthreads();
    for (int at = threadIdx.x; at < warp_size * N; at += blockDim.x) {
      RelativeSum<T> all = scratch[0][at];
      for (int w = 1; w < transport_warps; ++w) all = join.template both<Logs>(all, scratch[w][at]);
      const int64_t column = job % strips * warp_size * N + at;
      if (column < p.columns) parts[(problem * chunks + chunk) * p.columns + column] = all;
    }
    __syncthreads();
  }
}

template <class T, bool Logs>
__global__ void __launch_bounds__(transport_threads)
    transport_merge_kernel(const RelativeSum<T>* parts, int64_t problems, int64_t chunks, int64_t columns, T* s) {
  const Join<T> join{T(1)};
  for (int64_t at = grid_first(); at < problems * columns; at += grid_stride()) {
    const RelativeSum<T>* part = parts + at / columns * chunks * columns + at % columns;
    RelativeSum<T> all = part[0];
#pragma unroll 1
    for (int64_t chunk = 1; chunk < chunks; ++chunk) all = join.template both<Logs>(all, part[chunk * columns]);
    s[at] = Logs ? math::log(all.sum) + all.top : all.sum;
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------

inline int64_t transport_grid(int64_t blocks) { return blocks < transport_most_blocks ? blocks : transport_most_blocks; }

// Blocks for rows that a warp or a block takes each.
inline int64_t transport_row_grid(int64_t rows, bool by_block) {
  return transport_grid(by_block ? rows : (rows + transport_warps - 1) / transport_warps);
}

template <class T>
TransportCosts<T> transport_costs(const TransportTile& p, int64_t problems) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  return {at(p.cost), at(p.of_row), at(p.of_column), at(p.g), problems, p.rows, p.columns, static_cast<T>(1 / p.epsilon)};
}

template <class T>
bool transport_packs(const TransportTile& p, const void* more) {
  constexpr int width = pack_width<T>;
  return takes_packs<T, width>(p.cost, p.columns) && takes_packs<T, width>(p.g) &&
         (more == nullptr || takes_packs<T, width>(more));
}

// f and r (problems, rows) from v (problems, columns).
template <class T>
void transport_rows_on(const TransportTile& tile, int64_t problems, const void* v, void* f, void* r, void* stream) {
  const auto p = transport_costs<T>(tile, problems);
  const int64_t rows = problems * p.rows;
  if (rows == 0) return;
  const bool by_block = p.columns >= transport_long_row, packs = transport_packs<T>(tile, v);
  constexpr int width = pack_width<T>;
  const auto kernel = by_block ? (packs ? transport_rows_kernel<T, width, true> : transport_rows_kernel<T, 1, true>)
                               : (packs ? transport_rows_kernel<T, width, false> : transport_rows_kernel<T, 1, false>);
  launch(kernel, {transport_row_grid(rows, by_block), transport_threads, stream}, p, static_cast<const T*>(v), static_cast<T*>(f),
         static_cast<T*>(r));
}

// How the rows are shared out: enough chunks to fill a device where columns are few.
struct TransportChunks {
  int64_t count, step;
};

inline TransportChunks transport_chunks(int64_t rows, int64_t columns) {
  const int64_t strips = (columns + 127) / 128, wanted = (2048 + strips - 1) / strips;
  const int64_t limit = wanted < transport_most_chunks ? wanted : transport_most_chunks;
  int64_t step = (rows + limit - 1) / limit;
  if (step < 4 * transport_warps) step = 4 * transport_warps;
  return {rows > 0 ? (rows + step - 1) / step : 1, step};
}

// s (problems, columns) from f and u (problems, rows); `parts` holds problems * chunks * columns pairs.
template <class T>
void transport_columns_on(const TransportTile& tile, int64_t problems, const void* f, const void* u, bool logs,
                          void* parts, void* s, void* stream) {
  const auto p = transport_costs<T>(tile, problems);
  if (problems * p.columns == 0) return;
  const auto [chunks, step] = transport_chunks(p.rows, p.columns);
  constexpr int width = sizeof(T) == 4 ? pack_width<T> : 1;  // exponentials of doubles leave no registers for packs
  const bool packs = width > 1 && transport_packs<T>(tile, nullptr);
  const auto kernel = logs ? (packs ? transport_columns_kernel<T, width, true> : transport_columns_kernel<T, 1, true>)
                           : (packs ? transport_columns_kernel<T, width, false> : transport_columns_kernel<T, 1, false>);
  const int64_t strip = warp_size * (packs ? width : 1), strips = (p.columns + strip - 1) / strip;
  auto* pairs = static_cast<RelativeSum<T>*>(parts);
  launch(kernel, {transport_grid(problems * chunks * strips), transport_threads, stream}, p, static_cast<const T*>(f),
         static_cast<const T*>(u), chunks, step, pairs);
  const int64_t blocks = (problems * p.columns + transport_threads - 1) / transport_threads;
  launch(logs ? transport_merge_kernel<T, true> : transport_merge_kernel<T, false>,
         {transport_grid(blocks), transport_threads, stream}, static_cast<const RelativeSum<T>*>(pairs), problems,
         chunks, p.columns, static_cast<T*>(s));
}

}  // namespace counterpoise::cuda

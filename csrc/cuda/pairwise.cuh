// Pairwise family: a block takes a row of a tile of products, in two passes of which the second finds it in the cache.
//
// Sums are combined in an order that the shape alone decides. No sum runs down a column: where queries are keys, only
// the slopes serve both directions.
#pragma once

#include "../cpu/pairwise.h"
#include "../math/pairwise.h"
#include "block.cuh"

namespace counterpoise::cuda {

using PairTile = PairwiseTileOf<int64_t>;
using math::PairIds;
using math::PairRule;

constexpr int pairwise_threads = 256;
constexpr int64_t pairwise_most_blocks = 1 << 16;

CP_DEVICE bool meets(int rule, PairIds<int64_t> query, PairIds<int64_t> key) {
  switch (static_cast<PairRule>(rule)) {
    case PairRule::not_self: return math::holds<PairRule::not_self>(query, key);
    case PairRule::same_label: return math::holds<PairRule::same_label>(query, key);
    case PairRule::same_class: return math::holds<PairRule::same_class>(query, key);
    case PairRule::positive_or_bank: return math::holds<PairRule::positive_or_bank>(query, key);
    default: return false;
  }
}

CP_DEVICE bool asks_ids(int rule) {
  return static_cast<PairRule>(rule) != PairRule::every && static_cast<PairRule>(rule) != PairRule::none;
}

CP_DEVICE PairIds<int64_t> query_of(const PairTile& p, int64_t row) { return {p.query_row[row], p.query_label[row]}; }
CP_DEVICE PairIds<int64_t> key_of(const PairTile& p, int64_t column) {
  return {p.key_row[column], p.key_label[column]};
}

CP_DEVICE bool is_positive(const PairTile& p, int64_t query, int64_t key) {
  return asks_ids(p.positive) && meets(p.positive, query_of(p, query), key_of(p, key));
}

template <class T>
CP_DEVICE T logit(const PairTile& p, int64_t query, int64_t key, T product) {
  if (asks_ids(p.candidate) && !meets(p.candidate, query_of(p, query), key_of(p, key))) return -math::infinity<T>;
  if (p.itself != nullptr && p.itself[query] == key) return -math::infinity<T>;
  const T x = static_cast<T>(p.sharpness) * product;
  return p.log_weight == nullptr ? x : x + static_cast<const T*>(p.log_weight)[key];
}

// Calls f(column in the tile, probability) for the positives by index of a query, from `first` on by `step`.
template <class T, class F>
CP_DEVICE void for_indexed(const PairTile& p, int64_t query, int64_t start, int64_t count, int first, int step, F&& f) {
  if (p.index == nullptr) return;
  for (int64_t j = first; j < p.positives; j += step) {
    const int64_t at = query * p.positives + j, c = p.index[at] - start;
    const T t = p.probability == nullptr ? T(1) : static_cast<const T*>(p.probability)[at];
    if (c >= 0 && c < count && t > 0) f(c, t);
  }
}

// ---- sums -------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(pairwise_threads) pairwise_rows_kernel(PairTile p, PairwiseSums out) {
  __shared__ T single[warp_size];
  __shared__ Two<T> paired[warp_size];
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const int64_t query = p.first_row + i;
    T* s = static_cast<T*>(p.products) + i * p.columns;
    T top = -math::infinity<T>;
    Two<T> positives{0, 0};
    for (int64_t c = threadIdx.x; c < p.columns; c += blockDim.x) {
      const T x = logit(p, query, p.first_column + c, s[c]);
      top = x > top ? x : top;
      if (!is_positive(p, query, p.first_column + c)) continue;
      positives.first += s[c];
      positives.second += T(1);
    }
    for_indexed<T>(p, query, p.first_column, p.columns, threadIdx.x, blockDim.x,
                   [&](int64_t c, T t) { positives.first += t * s[c]; });
    const T before = static_cast<const T*>(out.top)[query];
    if (out.similarity != nullptr) positives = block_reduce(positives, Add(), paired);
    top = math::at_least(before, block_reduce(top, Larger(), single));
    const T shift = top == -math::infinity<T> ? T(0) : top;
    const T faded = before == top ? T(1) : math::exp(before - shift);
    Two<T> sums{0, 0};
    for (int64_t c = threadIdx.x; c < p.columns; c += blockDim.x) {
      const T product = s[c], e = math::exp(logit(p, query, p.first_column + c, product) - shift);
      sums.first += e;
      sums.second += e == 0 ? T(0) : e * product;
      if (out.keep) s[c] = e;
    }
    sums = block_reduce(sums, Add(), paired);
    if (out.mean_key != nullptr && faded != 1) {
      T* mean = static_cast<T*>(out.mean_key) + query * out.width;
      for (int64_t c = threadIdx.x; c < out.width; c += blockDim.x) mean[c] *= faded;
    }
    if (threadIdx.x != 0) continue;
    T* const total = static_cast<T*>(out.total) + query;
    static_cast<T*>(out.top)[query] = top;
    *total = *total * faded + sums.first;
    if (out.dot != nullptr) {
      T* const dot = static_cast<T*>(out.dot) + query;
      *dot = *dot * faded + sums.second;
    }
    if (out.similarity != nullptr) static_cast<T*>(out.similarity)[query] += positives.first;
    if (out.mass != nullptr) static_cast<T*>(out.mass)[query] += positives.second;
  }
}

// ---- slopes -----------------------------------------------------------------------------------------------------

template <class T>
CP_DEVICE T share(const PairTile& p, const PairwiseSlopes& d, int64_t query, int64_t key, T product) {
  const T x = logit(p, query, key, product);
  return math::exp(x - static_cast<const T*>(d.log_sum)[query]) * static_cast<const T*>(d.slope)[query];
}

template <class T>
CP_DEVICE T slope_of_pair(const PairTile& p, const PairwiseSlopes& d, int64_t query, int64_t key, T product) {
  const T* pull = static_cast<const T*>(d.pull);
  T slope;
  if (d.bend != nullptr && key >= d.fixed) {
    const T e = math::exp(logit(p, query, key, product) - static_cast<const T*>(d.log_sum)[query]);
    const T bend = static_cast<const T*>(d.bend)[query] * (product - static_cast<const T*>(d.middle)[query]);
    slope = e == 0 ? T(0) : e * (static_cast<const T*>(d.slope)[query] + bend);
  } else {
    slope = share(p, d, query, key, product);
  }
  if (pull != nullptr && is_positive(p, query, key)) slope += pull[query];
  if (!d.mirrored) return slope;
  slope += share(p, d, key, query, product);
  if (pull != nullptr && is_positive(p, key, query)) slope += pull[key];
  return slope;
}

template <class T>
__global__ void __launch_bounds__(pairwise_threads) pairwise_slopes_kernel(PairTile p, PairwiseSlopes d) {
  const T* pull = static_cast<const T*>(d.pull);
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const int64_t query = p.first_row + i;
    T* s = static_cast<T*>(p.products) + i * p.columns;
    for (int64_t c = threadIdx.x; c < p.columns; c += blockDim.x)
      s[c] = slope_of_pair(p, d, query, p.first_column + c, s[c]);
    if (pull == nullptr || p.index == nullptr) continue;
    __syncthreads();
    if (threadIdx.x == 0)  // an index may come twice
      for_indexed<T>(p, query, p.first_column, p.columns, 0, 1, [&](int64_t c, T t) { s[c] += t * pull[query]; });
  }
}

// What rows that stand in the tile as keys pull by index; a thread a column.
template <class T>
__global__ void __launch_bounds__(pairwise_threads) pairwise_pull_back_kernel(PairTile p, PairwiseSlopes d) {
  T* slopes = static_cast<T*>(p.products);
  for (int64_t c = grid_first(); c < p.columns; c += grid_stride()) {
    const int64_t query = p.first_column + c;
    const T pull = static_cast<const T*>(d.pull)[query];
    for_indexed<T>(p, query, p.first_row, p.rows, 0, 1, [&](int64_t i, T t) { slopes[i * p.columns + c] += t * pull; });
  }
}

// ---- independent pairs ------------------------------------------------------------------------------------------

// The sign of a pair, 0 where the key does not count.
template <class T>
CP_DEVICE T sign_of_pair(const PairTile& p, int64_t query, int64_t key) {
  if (p.log_weight != nullptr && static_cast<const T*>(p.log_weight)[key] == -math::infinity<T>) return T(0);
  bool positive = is_positive(p, query, key);
  for_indexed<T>(p, query, key, 1, 0, 1, [&](int64_t, T) { positive = true; });
  return positive ? T(1) : T(-1);
}

// Costs are summed, or with `upstream` their slopes, which then replace the products.
template <class T>
__global__ void __launch_bounds__(pairwise_threads)
    pairwise_sigmoid_kernel(PairTile p, const T* bias, const T* upstream, T* sums) {
  __shared__ T scratch[warp_size];
  const T b = *bias;
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const int64_t query = p.first_row + i;
    T* s = static_cast<T*>(p.products) + i * p.columns;
    T sum = 0;
    for (int64_t c = threadIdx.x; c < p.columns; c += blockDim.x) {
      const T sign = sign_of_pair<T>(p, query, p.first_column + c);
      const auto pair = math::log_sigmoid(sign * (s[c] + b));
      T value = pair.cost;
      if (upstream != nullptr) value = pair.slope * sign * upstream[query];
      value = sign == 0 ? T(0) : value;
      sum += value;
      if (upstream != nullptr) s[c] = value;
    }
    sum = block_reduce(sum, Add(), scratch);
    if (threadIdx.x == 0) sums[query] += sum;
  }
}

// ---- launches ---------------------------------------------------------------------------------------------------

inline Launch by_rows(const PairTile& p, void* stream) {
  int threads = warp_size;
  while (threads < pairwise_threads && threads * 4 < p.columns) threads *= 2;
  return {p.rows < pairwise_most_blocks ? p.rows : pairwise_most_blocks, threads, stream};
}

template <class T>
void pairwise_rows_on(const PairTile& p, const PairwiseSums& sums, void* stream) {
  if (p.rows > 0) launch(pairwise_rows_kernel<T>, by_rows(p, stream), p, sums);
}

template <class T>
void pairwise_slopes_on(const PairTile& p, const PairwiseSlopes& slopes, void* stream) {
  if (p.rows == 0 || p.columns == 0) return;
  launch(pairwise_slopes_kernel<T>, by_rows(p, stream), p, slopes);
  if (!slopes.mirrored || slopes.pull == nullptr || p.index == nullptr) return;
  const int64_t blocks = (p.columns + pairwise_threads - 1) / pairwise_threads;
  launch(pairwise_pull_back_kernel<T>, Launch{blocks, pairwise_threads, stream}, p, slopes);
}

template <class T>
void pairwise_sigmoid_on(const PairTile& p, const void* bias, const void* upstream, void* sums, void* stream) {
  if (p.rows == 0) return;
  launch(pairwise_sigmoid_kernel<T>, by_rows(p, stream), p, static_cast<const T*>(bias),
         static_cast<const T*>(upstream), static_cast<T*>(sums));
}

}  // namespace counterpoise::cuda

// Pairwise family: a block takes a row of a tile of products, several neighbours a thread. Its sums are made in one pass,
// relative to the largest logit so far; a second one, where the exponentials are asked for, finds the row in the cache.
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

// ---- neighbours that a thread takes together ---------------------------------------------------------------------

template <class T>
constexpr int pair_width = pack_width<T>;

// Calls f(products of some columns, the first of them, distance) for all that this thread has of a row; what lies beyond
// is zero. With `write` they are put back.
template <class T, class F>
CP_DEVICE void for_columns(const PairTile& p, T* s, bool packs, bool write, F&& f) {
  constexpr int width = pair_width<T>;
  const int64_t step = packs ? 1 : blockDim.x;
#pragma unroll 2  // so that several loads are under way before the first is used
  for (int64_t c = packs ? threadIdx.x * width : threadIdx.x; c < p.columns; c += blockDim.x * width) {
    T x[width];
    if (packs) {
      load_pack(s + c, x);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = c + k * step < p.columns ? s[c + k * step] : T(0);
    }
    f(x, c, step);
    if (!write) continue;
    if (packs) {
      store_pack(x, s + c);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (c + k * step < p.columns) s[c + k * step] = x[k];
    }
  }
}

// ---- sums -------------------------------------------------------------------------------------------------------

// Exponentials are relative to `top`.
template <class T>
struct PairShare {
  T top, total, dot;
};

template <class T>
CP_DEVICE PairShare<T> across(PairShare<T> x, int distance) {
  return {across(x.top, distance), across(x.total, distance), across(x.dot, distance)};
}

struct MergePairs {
  template <class R>
  static CP_DEVICE R none() {
    return R{-math::infinity<decltype(R::top)>, 0, 0};
  }
  // The share as it would be relative to a top that is no lower.
  template <class T>
  CP_DEVICE PairShare<T> raised(const PairShare<T>& x, T top) const {
    if (x.top == top || x.total == 0) return {top, x.total, x.dot};
    const T factor = math::exp(x.top - top);
    return {top, x.total * factor, x.dot * factor};
  }
  template <class T>
  CP_DEVICE PairShare<T> operator()(const PairShare<T>& a, const PairShare<T>& b) const {
    const T top = a.top > b.top ? a.top : b.top;
    const PairShare<T> x = raised(a, top), y = raised(b, top);
    return {top, x.total + y.total, x.dot + y.dot};
  }
};

// The sums of a row's candidates that this thread has, and of its positives by rule: their products and number.
template <class T>
CP_DEVICE PairShare<T> pair_share(const PairTile& p, int64_t query, T* s, bool packs, Two<T>& positives) {
  constexpr int width = pair_width<T>;
  const MergePairs merge;
  PairShare<T> mine = MergePairs::none<PairShare<T>>();
  for_columns(p, s, packs, false, [&](const T(&product)[width], int64_t c, int64_t step) {
    T x[width], top = mine.top;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int64_t at = c + k * step, key = p.first_column + at;
      x[k] = at < p.columns ? logit(p, query, key, product[k]) : -math::infinity<T>;
      top = x[k] > top ? x[k] : top;
      if (at >= p.columns || !is_positive(p, query, key)) continue;
      positives.first += product[k];
      positives.second += T(1);
    }
    mine = merge.raised(mine, top);
    T total = 0, dot = 0;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const T e = x[k] == -math::infinity<T> ? T(0) : math::exp(x[k] - top);
      total += e;
      dot += e == 0 ? T(0) : e * product[k];
    }
    mine.total += total;
    mine.dot += dot;
  });
  return mine;
}

template <class T>
__global__ void __launch_bounds__(pairwise_threads) pairwise_rows_kernel(PairTile p, PairwiseSums out, bool packs) {
  constexpr int width = pair_width<T>;
  __shared__ PairShare<T> shares[warp_size];
  __shared__ Two<T> paired[warp_size];
  const MergePairs merge;
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const int64_t query = p.first_row + i;
    T* s = static_cast<T*>(p.products) + i * p.columns;
    Two<T> positives{0, 0};
    PairShare<T> sums = pair_share(p, query, s, packs, positives);
    for_indexed<T>(p, query, p.first_column, p.columns, threadIdx.x, blockDim.x,
                   [&](int64_t c, T t) { positives.first += t * s[c]; });
    if (out.similarity != nullptr) positives = block_reduce(positives, Add(), paired);
    sums = block_reduce(sums, merge, shares);
    const T before = static_cast<const T*>(out.top)[query], top = math::at_least(before, sums.top);
    const T shift = top == -math::infinity<T> ? T(0) : top;
    const T faded = before == top ? T(1) : math::exp(before - shift);
    sums = merge.raised(sums, top);
    if (out.keep)
      for_columns(p, s, packs, true, [&](T(&x)[width], int64_t c, int64_t step) {
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (c + k * step < p.columns) x[k] = math::exp(logit(p, query, p.first_column + c + k * step, x[k]) - shift);
      });
    if (out.mean_key != nullptr && faded != 1) {
      T* mean = static_cast<T*>(out.mean_key) + query * out.width;
      for (int64_t c = threadIdx.x; c < out.width; c += blockDim.x) mean[c] *= faded;
    }
    __syncthreads();  // all have read `top`, which is written now
    if (threadIdx.x != 0) continue;
    T* const total = static_cast<T*>(out.total) + query;
    static_cast<T*>(out.top)[query] = top;
    *total = *total * faded + sums.total;
    if (out.dot != nullptr) {
      T* const dot = static_cast<T*>(out.dot) + query;
      *dot = *dot * faded + sums.dot;
    }
    if (out.similarity != nullptr) static_cast<T*>(out.similarity)[query] += positives.first;
    if (out.mass != nullptr) static_cast<T*>(out.mass)[query] += positives.second;
  }
}

// ---- slopes -----------------------------------------------------------------------------------------------------

// What a row brings to its slopes.
template <class T>
struct RowOfSlopes {
  T log_sum, slope, pull, bend, middle;
};

template <class T>
CP_DEVICE RowOfSlopes<T> slopes_of_row(const PairwiseSlopes& d, int64_t row) {
  const auto at = [&](const void* x) { return x == nullptr ? T(0) : static_cast<const T*>(x)[row]; };
  return {at(d.log_sum), at(d.slope), at(d.pull), at(d.bend), at(d.middle)};
}

template <class T>
CP_DEVICE T slope_of_pair(const PairTile& p, const PairwiseSlopes& d, const RowOfSlopes<T>& of, int64_t query, int64_t key,
                          T product) {
  const T e = math::exp(logit(p, query, key, product) - of.log_sum);
  T slope = e * of.slope;
  if (d.bend != nullptr && key >= d.fixed) slope = e == 0 ? T(0) : e * (of.slope + of.bend * (product - of.middle));
  if (d.pull != nullptr && is_positive(p, query, key)) slope += of.pull;
  if (!d.mirrored) return slope;
  const auto at = [&](const void* x) { return static_cast<const T*>(x)[key]; };
  slope += math::exp(logit(p, key, query, product) - at(d.log_sum)) * at(d.slope);
  if (d.pull != nullptr && is_positive(p, key, query)) slope += at(d.pull);
  return slope;
}

template <class T>
__global__ void __launch_bounds__(pairwise_threads) pairwise_slopes_kernel(PairTile p, PairwiseSlopes d, bool packs) {
  constexpr int width = pair_width<T>;
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const int64_t query = p.first_row + i;
    T* s = static_cast<T*>(p.products) + i * p.columns;
    const RowOfSlopes<T> of = slopes_of_row<T>(d, query);
    for_columns(p, s, packs, true, [&](T(&x)[width], int64_t c, int64_t step) {
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (c + k * step < p.columns) x[k] = slope_of_pair(p, d, of, query, p.first_column + c + k * step, x[k]);
    });
    if (d.pull == nullptr || p.index == nullptr) continue;
    __syncthreads();
    if (threadIdx.x == 0)  // an index may come twice
      for_indexed<T>(p, query, p.first_column, p.columns, 0, 1, [&](int64_t c, T t) { s[c] += t * of.pull; });
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
bool pair_packs(const PairTile& p) {
  return takes_packs<T, pair_width<T>>(p.products, p.columns);
}

template <class T>
void pairwise_rows_on(const PairTile& p, const PairwiseSums& sums, void* stream) {
  if (p.rows > 0) launch(pairwise_rows_kernel<T>, by_rows(p, stream), p, sums, pair_packs<T>(p));
}

template <class T>
void pairwise_slopes_on(const PairTile& p, const PairwiseSlopes& slopes, void* stream) {
  if (p.rows == 0 || p.columns == 0) return;
  launch(pairwise_slopes_kernel<T>, by_rows(p, stream), p, slopes, pair_packs<T>(p));
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

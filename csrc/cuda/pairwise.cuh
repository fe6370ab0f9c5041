// Pairwise family: a block takes a row of a tile of products, several neighbours a thread. Its sums are made in one pass,
// relative to the largest logit so far; a second one, where the exponentials are asked for, finds the row in the cache.
//
// Sums are combined in an order that shape and alignment decide. No sum runs down a column: where queries are keys, only
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
constexpr int pairwise_resident = 2;  // blocks on a multiprocessor, at least: what registers are shared out for
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

CP_INLINE bool asks_ids(int rule) {
  return static_cast<PairRule>(rule) != PairRule::every && static_cast<PairRule>(rule) != PairRule::none;
}

CP_DEVICE PairIds<int64_t> query_of(const PairTile& p, int64_t row) { return {p.query_row[row], p.query_label[row]}; }
CP_DEVICE PairIds<int64_t> key_of(const PairTile& p, int64_t column) {
  return {p.key_row[column], p.key_label[column]};
}

// A row of a tile, with what its pairs have in common. Rules: whether a rule asks for ids.
template <bool Rules>
struct PairRow {
  const PairTile& p;
  int64_t query;
  PairIds<int64_t> ids;
  int64_t itself;  // the key that is no candidate, -1 = none

  CP_DEVICE PairRow(const PairTile& p, int64_t query)
      : p(p), query(query), ids{}, itself(p.itself == nullptr ? -1 : p.itself[query]) {
    if (Rules && p.query_row != nullptr) ids = query_of(p, query);
  }
  CP_DEVICE bool is_positive(int64_t key) const {
    return Rules && asks_ids(p.positive) && meets(p.positive, ids, key_of(p, key));
  }
  template <class T>
  CP_DEVICE T logit(int64_t key, T product) const {
    if (Rules && asks_ids(p.candidate) && !meets(p.candidate, ids, key_of(p, key))) return -math::infinity<T>;
    if (key == itself) return -math::infinity<T>;
    const T x = static_cast<T>(p.sharpness) * product;
    return p.log_weight == nullptr ? x : x + static_cast<const T*>(p.log_weight)[key];
  }
};

inline bool has_rules(const PairTile& p) { return asks_ids(p.positive) || asks_ids(p.candidate); }

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

// Calls f(products of columns c, c + step, ..., c, step) for all that this thread has of a row; what lies beyond is zero.
// With Write they are put back.
template <bool Packs, bool Write, class T, class F>
CP_DEVICE void for_columns(T* s, int columns, F&& f) {
  constexpr int width = pair_width<T>;
  const int threads = static_cast<int>(blockDim.x), step = Packs ? 1 : threads;
#pragma unroll 4  // so that several loads are under way before the first is used
  for (int c = static_cast<int>(threadIdx.x) * (Packs ? width : 1); c < columns; c += threads * width) {
    T x[width];
    if constexpr (Packs) {
      load_pack(s + c, x);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] = c + k * step < columns ? s[c + k * step] : T(0);
    }
    f(x, c, step);
    if constexpr (Write && Packs) store_pack(x, s + c);
    if constexpr (Write && !Packs) {
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (c + k * step < columns) s[c + k * step] = x[k];
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
template <bool Packs, bool Rules, class T>
CP_DEVICE PairShare<T> pair_share(const PairRow<Rules>& row, T* s, int columns, Two<T>& positives) {
  constexpr int width = pair_width<T>;
  const MergePairs merge;
  PairShare<T> mine = MergePairs::none<PairShare<T>>();
  for_columns<Packs, false>(s, columns, [&](const T(&product)[width], int c, int step) {
    T x[width], top = mine.top;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int at = c + k * step;
      const int64_t key = row.p.first_column + at;
      const bool here = Packs || at < columns;
      x[k] = here ? row.logit(key, product[k]) : -math::infinity<T>;
      top = x[k] > top ? x[k] : top;
      if (!here || !row.is_positive(key)) continue;
      positives.first += product[k];
      positives.second += T(1);
    }
    mine = merge.raised(mine, top);
    const T base = top > -math::infinity<T> ? top : T(0);  // inf - inf would be NaN
    T total = 0, dot = 0;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const T e = math::exp(x[k] - base);
      total += e;
      dot += e == 0 ? T(0) : e * product[k];
    }
    mine.total += total;
    mine.dot += dot;
  });
  return mine;
}

template <class T, bool Packs, bool Rules>
__global__ void __launch_bounds__(pairwise_threads, pairwise_resident) pairwise_rows_kernel(PairTile p, PairwiseSums out) {
  constexpr int width = pair_width<T>;
  __shared__ PairShare<T> shares[warp_size];
  __shared__ Two<T> paired[warp_size];
  const MergePairs merge;
  const int columns = static_cast<int>(p.columns);
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const PairRow<Rules> row(p, p.first_row + i);
    const int64_t query = row.query;
    T* s = static_cast<T*>(p.products) + i * columns;
    Two<T> positives{0, 0};
    PairShare<T> sums = pair_share<Packs>(row, s, columns, positives);
    for_indexed<T>(p, query, p.first_column, columns, threadIdx.x, blockDim.x,
                   [&](int64_t c, T t) { positives.first += t * s[c]; });
    if (out.similarity != nullptr) positives = block_reduce(positives, Add(), paired);
    sums = block_reduce(sums, merge, shares);
    const T before = static_cast<const T*>(out.top)[query], top = math::at_least(before, sums.top);
    const T shift = top == -math::infinity<T> ? T(0) : top;
    const T faded = before == top ? T(1) : math::exp(before - shift);
    sums = merge.raised(sums, top);
    if (out.keep)
      for_columns<Packs, true>(s, columns, [&](T(&x)[width], int c, int step) {
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (Packs || c + k * step < columns) x[k] = math::exp(row.logit(p.first_column + c + k * step, x[k]) - shift);
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

template <bool Rules, class T>
CP_DEVICE T slope_of_pair(const PairRow<Rules>& row, const PairwiseSlopes& d, const RowOfSlopes<T>& of, int64_t key,
                          T product) {
  const T e = math::exp(row.logit(key, product) - of.log_sum);
  T slope = e * of.slope;
  if (d.bend != nullptr && key >= d.fixed) slope = e == 0 ? T(0) : e * (of.slope + of.bend * (product - of.middle));
  if (d.pull != nullptr && row.is_positive(key)) slope += of.pull;
  return slope;
}

// What the pair gives where the key is the query: then the rows are the keys.
template <bool Rules, class T>
CP_DEVICE T slope_of_mirror(const PairTile& p, const PairwiseSlopes& d, int64_t query, int64_t key, T product) {
  const PairRow<Rules> row(p, key);
  const auto at = [&](const void* x) { return static_cast<const T*>(x)[key]; };
  const T slope = math::exp(row.logit(query, product) - at(d.log_sum)) * at(d.slope);
  return d.pull != nullptr && row.is_positive(query) ? slope + at(d.pull) : slope;
}

template <class T, bool Packs, bool Rules>
__global__ void __launch_bounds__(pairwise_threads, pairwise_resident)
    pairwise_slopes_kernel(PairTile p, PairwiseSlopes d) {
  constexpr int width = pair_width<T>;
  const int columns = static_cast<int>(p.columns);
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const PairRow<Rules> row(p, p.first_row + i);
    T* s = static_cast<T*>(p.products) + i * columns;
    const RowOfSlopes<T> of = slopes_of_row<T>(d, row.query);
    for_columns<Packs, true>(s, columns, [&](T(&x)[width], int c, int step) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (!Packs && c + k * step >= columns) continue;
        const int64_t key = p.first_column + c + k * step;
        const T product = x[k];
        x[k] = slope_of_pair(row, d, of, key, product);
        if (d.mirrored) x[k] += slope_of_mirror<Rules>(p, d, row.query, key, product);
      }
    });
    if (d.pull == nullptr || p.index == nullptr) continue;
    __syncthreads();
    if (threadIdx.x == 0)  // an index may come twice
      for_indexed<T>(p, row.query, p.first_column, columns, 0, 1, [&](int64_t c, T t) { s[c] += t * of.pull; });
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
CP_DEVICE T sign_of_pair(const PairRow<true>& row, int64_t key) {
  const PairTile& p = row.p;
  if (p.log_weight != nullptr && static_cast<const T*>(p.log_weight)[key] == -math::infinity<T>) return T(0);
  bool positive = row.is_positive(key);
  for_indexed<T>(p, row.query, key, 1, 0, 1, [&](int64_t, T) { positive = true; });
  return positive ? T(1) : T(-1);
}

// Costs are summed, or with `upstream` their slopes, which then replace the products.
template <class T, bool Packs>
__global__ void __launch_bounds__(pairwise_threads, pairwise_resident)
    pairwise_sigmoid_kernel(PairTile p, const T* bias, const T* upstream, T* sums) {
  constexpr int width = pair_width<T>;
  __shared__ T scratch[warp_size];
  const T b = *bias;
  const int columns = static_cast<int>(p.columns);
  for (int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) {
    const PairRow<true> row(p, p.first_row + i);
    T* s = static_cast<T*>(p.products) + i * columns;
    const T by = upstream == nullptr ? T(0) : upstream[row.query];
    T sum = 0;
    const auto take = [&](T(&x)[width], int c, int step) {
      T pack = 0;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        if (!Packs && c + k * step >= columns) continue;
        const T sign = sign_of_pair<T>(row, p.first_column + c + k * step);
        const auto pair = math::log_sigmoid(sign * (x[k] + b));
        const T value = upstream == nullptr ? pair.cost : pair.slope * sign * by;
        x[k] = sign == 0 ? T(0) : value;
        pack += x[k];
      }
      sum += pack;
    };
    upstream == nullptr ? for_columns<Packs, false>(s, columns, take) : for_columns<Packs, true>(s, columns, take);
    sum = block_reduce(sum, Add(), scratch);
    if (threadIdx.x == 0) sums[row.query] += sum;
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
  if (p.rows == 0) return;
  const bool packs = pair_packs<T>(p);
  const auto kernel = has_rules(p) ? (packs ? pairwise_rows_kernel<T, true, true> : pairwise_rows_kernel<T, false, true>)
                                   : (packs ? pairwise_rows_kernel<T, true, false> : pairwise_rows_kernel<T, false, false>);
  launch(kernel, by_rows(p, stream), p, sums);
}

template <class T>
void pairwise_slopes_on(const PairTile& p, const PairwiseSlopes& slopes, void* stream) {
  if (p.rows == 0 || p.columns == 0) return;
  const bool packs = pair_packs<T>(p);
  const auto kernel = has_rules(p)
                          ? (packs ? pairwise_slopes_kernel<T, true, true> : pairwise_slopes_kernel<T, false, true>)
                          : (packs ? pairwise_slopes_kernel<T, true, false> : pairwise_slopes_kernel<T, false, false>);
  launch(kernel, by_rows(p, stream), p, slopes);
  if (!slopes.mirrored || slopes.pull == nullptr || p.index == nullptr) return;
  const int64_t blocks = (p.columns + pairwise_threads - 1) / pairwise_threads;
  launch(pairwise_pull_back_kernel<T>, Launch{blocks, pairwise_threads, stream}, p, slopes);
}

template <class T>
void pairwise_sigmoid_on(const PairTile& p, const void* bias, const void* upstream, void* sums, void* stream) {
  if (p.rows == 0) return;
  launch(pair_packs<T>(p) ? pairwise_sigmoid_kernel<T, true> : pairwise_sigmoid_kernel<T, false>, by_rows(p, stream), p,
         static_cast<const T*>(bias), static_cast<const T*>(upstream), static_cast<T*>(sums));
}

}  // namespace counterpoise::cuda

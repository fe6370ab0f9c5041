// Pairwise family: a row of a tile is taken through the first cache in short passes, each of which is vector code.
#include "../pairwise.h"

#include "../../math/pairwise.h"
#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

using math::PairIds;
using math::PairRule;

template <PairRule R>
struct Is {
  static constexpr PairRule rule = R;
};

template <class F>
void with_rule(int rule, F&& f) {
  switch (static_cast<PairRule>(rule)) {
    case PairRule::not_self: return f(Is<PairRule::not_self>{});
    case PairRule::same_label: return f(Is<PairRule::same_label>{});
    case PairRule::same_class: return f(Is<PairRule::same_class>{});
    case PairRule::positive_or_bank: return f(Is<PairRule::positive_or_bank>{});
    default: return;
  }
}

bool asks_ids(int rule) {
  return static_cast<PairRule>(rule) != PairRule::every && static_cast<PairRule>(rule) != PairRule::none;
}

template <class T>
CP_INLINE T largest(const T* x, int64_t n) {
  T part[16];
  for (int k = 0; k < 16; ++k) part[k] = -math::infinity<T>;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; ++k) part[k] = x[i + k] > part[k] ? x[i + k] : part[k];
  T top = -math::infinity<T>;
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  for (int k = 0; k < 16; ++k) top = part[k] > top ? part[k] : top;
  return top;
}

// One query's ids and those of the keys from a column on.
struct Ids {
  PairIds<int32_t> query;
  const int32_t *rows, *labels;

  PairIds<int32_t> key(int64_t c) const { return {rows[c], labels[c]}; }
};

Ids ids_of(const PairwiseTile& p, int64_t row, int64_t column) {
  return {{p.query_row[row], p.query_label[row]}, p.key_row + column, p.key_label + column};
}

template <class T>
const T* products_of(const PairwiseTile& p, int64_t i) {
  return static_cast<const T*>(p.products) + i * p.columns;
}

// Calls f(column in the tile, probability) for the positives by index of a row that lie in the tile.
template <class T, class F>
CP_INLINE void for_indexed(const PairwiseTile& p, int64_t row, int64_t first, int64_t count, F&& f) {
  if (p.index == nullptr) return;
  const T* t = static_cast<const T*>(p.probability);
  for (int64_t j = 0; j < p.positives; ++j) {
    const int64_t c = p.index[row * p.positives + j] - first;
    const T probability = t == nullptr ? T(1) : t[row * p.positives + j];
    if (c >= 0 && c < count && probability > 0) f(c, probability);
  }
}

template <class T>
void drop(const PairwiseTile& p, int64_t row, int64_t column, int64_t n, T* x) {
  if (!asks_ids(p.candidate)) return;
  const Ids ids = ids_of(p, row, column);
  with_rule(p.candidate, [&](auto is) {
    for (int64_t c = 0; c < n; ++c)
      x[c] = math::holds<decltype(is)::rule>(ids.query, ids.key(c)) ? x[c] : -math::infinity<T>;
  });
}

// Logits of a row of the tile, -infinity where there is no candidate.
template <class T>
void logits(const PairwiseTile& p, int64_t i, const T* s, T* x) {
  const T sharpness = static_cast<T>(p.sharpness);
  const int64_t n = p.columns, row = p.first_row + i;
  if (p.log_weight == nullptr) {
    for (int64_t c = 0; c < n; ++c) x[c] = sharpness * s[c];
  } else {
    const T* w = static_cast<const T*>(p.log_weight) + p.first_column;
    for (int64_t c = 0; c < n; ++c) x[c] = sharpness * s[c] + w[c];
  }
  drop(p, row, p.first_column, n, x);
  if (p.itself == nullptr) return;
  const int64_t own = p.itself[row] - p.first_column;
  if (own >= 0 && own < n) x[own] = -math::infinity<T>;
}

// `shift` is no less than any x.
template <class T>
CP_INLINE void exps(T* x, int64_t n, T shift) {
  for (int64_t c = 0; c < n; ++c) x[c] = math::exp_of_negative(x[c] - shift);
}

// The same, and the sum of x s.
template <class T>
CP_INLINE T exps_and_dot(T* __restrict x, int64_t n, T shift, const T* __restrict s) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t c = 0; c < n; ++c) {
    const T e = math::exp_of_negative(x[c] - shift);
    x[c] = e;
    dot += e == 0 ? T(0) : e * s[c];
  }
  return dot;
}

// Products and number of a row's positives by rule, both through a buffer of n.
template <class T>
void positives_by_rule(const PairwiseTile& p, const Ids& ids, const T* s, int64_t n, T* buffer, T& similarity, T& mass) {
  with_rule(p.positive, [&](auto is) {
    for (int64_t c = 0; c < n; ++c)
      buffer[c] = math::holds<decltype(is)::rule>(ids.query, ids.key(c)) ? s[c] : T(0);
    similarity += sum(buffer, n);
    for (int64_t c = 0; c < n; ++c)
      buffer[c] = math::holds<decltype(is)::rule>(ids.query, ids.key(c)) ? T(1) : T(0);
    mass += sum(buffer, n);
  });
}

template <class T>
void rows_of(const PairwiseTile& p, const PairwiseSums& out, int64_t begin, int64_t end) {
  alignas(64) T x[pairwise_widest], y[pairwise_widest];
  const int64_t n = p.columns;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.first_row + i;
    T* s = static_cast<T*>(p.products) + i * n;
    if (out.similarity != nullptr) {
      T &similarity = static_cast<T*>(out.similarity)[row], unused = 0;
      T& mass = out.mass == nullptr ? unused : static_cast<T*>(out.mass)[row];
      for_indexed<T>(p, row, p.first_column, n, [&](int64_t c, T t) { similarity += t * s[c]; });
      if (asks_ids(p.positive)) positives_by_rule(p, ids_of(p, row, p.first_column), s, n, y, similarity, mass);
    }
    logits(p, i, s, x);
    T &top = static_cast<T*>(out.top)[row], &total = static_cast<T*>(out.total)[row];
    const T before = top;
    top = math::at_least(before, largest(x, n));
    const T shift = top == -math::infinity<T> ? T(0) : top;
    const T faded = before == top ? T(1) : math::exp(before - shift);
    if (out.dot == nullptr) {
      exps(x, n, shift);
    } else {
      T& dot = static_cast<T*>(out.dot)[row];
      dot = dot * faded + exps_and_dot(x, n, shift, s);
    }
    total = total * faded + sum(x, n);
    if (out.mean_key != nullptr && faded != 1) {
      T* mean = static_cast<T*>(out.mean_key) + row * out.width;
      for (int64_t c = 0; c < out.width; ++c) mean[c] *= faded;
    }
    if (out.keep)
      for (int64_t c = 0; c < n; ++c) s[c] = x[c];
  }
}

template <class T>
void both_of(const PairwiseTile& p, const PairwiseSums& out, int64_t begin, int64_t end, void* by_row) {
  alignas(64) T x[pairwise_strip], y[pairwise_strip], total[pairwise_strip], similarity[pairwise_strip];
  alignas(64) T mass[pairwise_strip];
  const int64_t n = end - begin, column = p.first_column + begin;
  const T shift = static_cast<const T*>(out.top)[0], sharpness = static_cast<T>(p.sharpness);
  T *row_total = static_cast<T*>(by_row), *row_similarity = row_total + p.rows, *row_mass = row_similarity + p.rows;
  for (int64_t c = 0; c < n; ++c) total[c] = similarity[c] = mass[c] = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t row = p.first_row + i;
    const T* s = products_of<T>(p, i) + begin;
    for (int64_t c = 0; c < n; ++c) x[c] = sharpness * s[c] - shift;
    drop(p, row, column, n, x);
    exps(x, n, T(0));
    row_total[i] = sum(x, n);
    for (int64_t c = 0; c < n; ++c) total[c] += x[c];
    row_similarity[i] = row_mass[i] = 0;
    for_indexed<T>(p, row, column, n, [&](int64_t c, T t) { row_similarity[i] += t * s[c]; });
    if (!asks_ids(p.positive)) continue;
    const Ids ids = ids_of(p, row, column);
    with_rule(p.positive, [&](auto is) {
      for (int64_t c = 0; c < n; ++c) {
        const bool positive = math::holds<decltype(is)::rule>(ids.query, ids.key(c));
        x[c] = positive ? s[c] : T(0);
        y[c] = positive ? T(1) : T(0);
        similarity[c] += x[c];
        mass[c] += y[c];
      }
    });
    row_similarity[i] = sum(x, n);
    row_mass[i] = sum(y, n);
  }
  T *all = static_cast<T*>(out.total) + column, *of_positives = static_cast<T*>(out.similarity) + column;
  for (int64_t c = 0; c < n; ++c) all[c] += total[c];
  for (int64_t c = 0; c < n; ++c) {
    for_indexed<T>(p, column + c, p.first_row, p.rows,
                   [&](int64_t i, T t) { similarity[c] += t * products_of<T>(p, i)[begin + c]; });
    of_positives[c] += similarity[c];
  }
  if (out.mass == nullptr) return;
  T* number = static_cast<T*>(out.mass) + column;
  for (int64_t c = 0; c < n; ++c) number[c] += mass[c];
}

template <class T>
void bent(const PairwiseTile& p, const PairwiseSlopes& d, int64_t row, T shift, const T* s, T* x) {
  const T slope = static_cast<const T*>(d.slope)[row], bend = static_cast<const T*>(d.bend)[row];
  const T middle = static_cast<const T*>(d.middle)[row];
  const int64_t n = p.columns, straight = d.fixed - p.first_column;
  const int64_t first = straight < 0 ? 0 : (straight < n ? straight : n);
  for (int64_t c = 0; c < first; ++c) x[c] = math::exp_of_negative(x[c] - shift) * slope;
  for (int64_t c = first; c < n; ++c) {
    const T e = math::exp_of_negative(x[c] - shift);
    x[c] = e == 0 ? T(0) : e * (slope + bend * (s[c] - middle));
  }
}

template <class T>
void shares(const PairwiseTile& p, const PairwiseSlopes& d, int64_t row, const T* s, T* x) {
  const T *log_sum = static_cast<const T*>(d.log_sum), *slope = static_cast<const T*>(d.slope);
  const T own = slope[row];
  const int64_t n = p.columns;
  if (!d.mirrored) {
    const T shift = log_sum[row];
    if (d.bend != nullptr) return bent(p, d, row, shift, s, x);
    for (int64_t c = 0; c < n; ++c) x[c] = math::exp_of_negative(x[c] - shift) * own;
    return;
  }
  const T* others = slope + p.first_column;
  if (d.bounded) {
    const T shift = log_sum[0];
    for (int64_t c = 0; c < n; ++c) x[c] = math::exp_of_negative(x[c] - shift) * (own + others[c]);
    return;
  }
  const T *sums = log_sum + p.first_column, sum_of_row = log_sum[row];
  for (int64_t c = 0; c < n; ++c)
    x[c] = math::exp_of_negative(x[c] - sum_of_row) * own + math::exp_of_negative(x[c] - sums[c]) * others[c];
}

template <class T>
void slopes_of(const PairwiseTile& p, const PairwiseSlopes& d, int64_t begin, int64_t end) {
  alignas(64) T x[pairwise_widest];
  const T* pull = static_cast<const T*>(d.pull);
  const int64_t n = p.columns;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.first_row + i;
    T* s = static_cast<T*>(p.products) + i * n;
    logits(p, i, s, x);
    shares(p, d, row, s, x);
    if (pull != nullptr && asks_ids(p.positive)) {
      const Ids ids = ids_of(p, row, p.first_column);
      const T own = pull[row];
      with_rule(p.positive, [&](auto is) {
        if (d.mirrored) {
          const T* others = pull + p.first_column;
          for (int64_t c = 0; c < n; ++c)
            x[c] += math::holds<decltype(is)::rule>(ids.query, ids.key(c)) ? own + others[c] : T(0);
        } else {
          for (int64_t c = 0; c < n; ++c) x[c] += math::holds<decltype(is)::rule>(ids.query, ids.key(c)) ? own : T(0);
        }
      });
    }
    if (pull != nullptr)
      for_indexed<T>(p, row, p.first_column, n, [&](int64_t c, T t) { x[c] += t * pull[row]; });
    for (int64_t c = 0; c < n; ++c) s[c] = x[c];
  }
}

template <class T>
void pull_back_of(const PairwiseTile& p, const PairwiseSlopes& d) {
  const T* pull = static_cast<const T*>(d.pull);
  T* slopes = static_cast<T*>(p.products);
  for (int64_t c = 0; c < p.columns; ++c)
    for_indexed<T>(p, p.first_column + c, p.first_row, p.rows, [&](int64_t i, T t) {
      slopes[i * p.columns + c] += t * pull[p.first_column + c];
    });
}

// product + bias, with the sign of the pair; and the signs.
template <class T>
void signed_logits(const PairwiseTile& p, int64_t row, T bias, const T* s, T* x, T* sign) {
  const int64_t n = p.columns;
  for (int64_t c = 0; c < n; ++c) sign[c] = T(-1);
  for_indexed<T>(p, row, p.first_column, n, [&](int64_t c, T) { sign[c] = T(1); });
  if (asks_ids(p.positive)) {
    const Ids ids = ids_of(p, row, p.first_column);
    with_rule(p.positive, [&](auto is) {
      for (int64_t c = 0; c < n; ++c)
        sign[c] = math::holds<decltype(is)::rule>(ids.query, ids.key(c)) ? T(1) : T(-1);
    });
  }
  for (int64_t c = 0; c < n; ++c) x[c] = sign[c] * (s[c] + bias);
}

template <class T>
void only_living(const PairwiseTile& p, T* x) {
  if (p.log_weight == nullptr) return;
  const T* w = static_cast<const T*>(p.log_weight) + p.first_column;
  for (int64_t c = 0; c < p.columns; ++c) x[c] = w[c] == -math::infinity<T> ? T(0) : x[c];
}

template <class T>
void sigmoid_of(const PairwiseTile& p, const void* bias, void* sums, int64_t begin, int64_t end) {
  alignas(64) T x[pairwise_widest], sign[pairwise_widest];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.first_row + i;
    signed_logits(p, row, *static_cast<const T*>(bias), products_of<T>(p, i), x, sign);
    for (int64_t c = 0; c < p.columns; ++c) x[c] = math::log_sigmoid(x[c]).cost;
    only_living(p, x);
    static_cast<T*>(sums)[row] += sum(x, p.columns);
  }
}

template <class T>
void sigmoid_slopes_of(const PairwiseTile& p, const void* bias, const void* upstream, void* sums, int64_t begin,
                       int64_t end) {
  alignas(64) T x[pairwise_widest], sign[pairwise_widest];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = p.first_row + i;
    const T g = static_cast<const T*>(upstream)[row];
    T* s = static_cast<T*>(p.products) + i * p.columns;
    signed_logits(p, row, *static_cast<const T*>(bias), s, x, sign);
    for (int64_t c = 0; c < p.columns; ++c) x[c] = math::log_sigmoid(x[c]).slope * sign[c] * g;
    only_living(p, x);
    static_cast<T*>(sums)[row] += sum(x, p.columns);
    for (int64_t c = 0; c < p.columns; ++c) s[c] = x[c];
  }
}

void rows(const PairwiseTile& p, const PairwiseSums& sums, int64_t begin, int64_t end) {
  p.in_double ? rows_of<double>(p, sums, begin, end) : rows_of<float>(p, sums, begin, end);
}

void both(const PairwiseTile& p, const PairwiseSums& sums, int64_t begin, int64_t end, void* by_row) {
  p.in_double ? both_of<double>(p, sums, begin, end, by_row) : both_of<float>(p, sums, begin, end, by_row);
}

void slopes(const PairwiseTile& p, const PairwiseSlopes& d, int64_t begin, int64_t end) {
  p.in_double ? slopes_of<double>(p, d, begin, end) : slopes_of<float>(p, d, begin, end);
}

void pull_back(const PairwiseTile& p, const PairwiseSlopes& d) {
  p.in_double ? pull_back_of<double>(p, d) : pull_back_of<float>(p, d);
}

void sigmoid(const PairwiseTile& p, const void* bias, void* sums, int64_t begin, int64_t end) {
  p.in_double ? sigmoid_of<double>(p, bias, sums, begin, end) : sigmoid_of<float>(p, bias, sums, begin, end);
}

void sigmoid_slopes(const PairwiseTile& p, const void* bias, const void* upstream, void* sums, int64_t begin,
                    int64_t end) {
  p.in_double ? sigmoid_slopes_of<double>(p, bias, upstream, sums, begin, end)
              : sigmoid_slopes_of<float>(p, bias, upstream, sums, begin, end);
}

}  // namespace

const PairwiseTable pairwise_table = {rows, both, slopes, pull_back, sigmoid, sigmoid_slopes};

}  // namespace counterpoise::CP_ARCH

// Row-wise family: a row belongs to some lanes of a warp or, where it is long, to a block. The forward pass reads it
// once (twice for the asymmetric form), keeping sums relative to the largest logit so far, and leaves five numbers a row
// from which the backward pass makes the gradient in one more pass; kept_rows.cuh makes both at once. Sums are added in
// an order that shape and alignment decide, and whether the total comes with its gradient. What the mean divides by is
// found on the device: nothing waits for the host.
#pragma once

#include "row_input.cuh"

namespace counterpoise::cuda {

// ---- sums of a row ----------------------------------------------------------------------------------------------

// Sums over some of a row's other classes; `gap` and `sum` are relative to `top`.
template <class T>
struct RowShare {
  T top, sum, live, weight, gap;
};

template <class T>
CP_DEVICE RowShare<T> across(RowShare<T> x, int distance) {
  return {across(x.top, distance), across(x.sum, distance), across(x.live, distance), across(x.weight, distance),
          across(x.gap, distance)};
}

struct MergeRows {
  bool weigh_gap;

  template <class R>
  static CP_DEVICE R none() {
    return R{-math::infinity<decltype(R::top)>, 0, 0, 0, 0};
  }
  // The share as it would be relative to a top that is no lower.
  template <class T>
  CP_DEVICE RowShare<T> raised(const RowShare<T>& x, T top) const {
    if (x.top == top) return x;
    const T gap = x.live > 0 ? x.gap + (weigh_gap ? x.weight : x.live) * (x.top - top) : T(0);
    return {top, x.sum == 0 ? T(0) : x.sum * math::exp(x.top - top), x.live, x.weight, gap};
  }
  template <class T>
  CP_DEVICE RowShare<T> operator()(const RowShare<T>& a, const RowShare<T>& b) const {
    const T top = a.top > b.top ? a.top : b.top;
    const RowShare<T> x = raised(a, top), y = raised(b, top);
    return {top, x.sum + y.sum, x.live + y.live, x.weight + y.weight, x.gap + y.gap};
  }
};

// Adds what smoothing asks for.
template <class S, class T, int N>
CP_DEVICE void add_smoothed(const RowInput<S>& p, const T (&u)[N], T top, int j, int step, bool weigh_gap,
                            RowShare<T>& to) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!(u[k] > -math::infinity<T>)) continue;
    const T w = p.weight(j + k * step);
    to.live += 1;
    to.weight += w;
    to.gap += (weigh_gap ? w : T(1)) * (u[k] - top);
  }
}

// exp(u - top) in place, and their sum: of few terms, which rounds less than a running one.
template <class T, int N>
CP_DEVICE T exponentials(T (&u)[N], T top) {
  const T base = top > -math::infinity<T> ? top : T(0);  // inf - inf would be NaN
  T sum = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    u[k] = math::exp(u[k] - base);
    sum += u[k];
  }
  return sum;
}

template <bool Packs, class S>
CP_DEVICE RowShare<computed_t<S>> share_of(const RowInput<S>& p, const RowGroup& who, int64_t row, const MergeRows& merge) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  RowShare<T> mine = MergeRows::none<RowShare<T>>();
  for_classes<Packs>(p, who, row, 0, p.classes, [&](T(&u)[width], int j, int step) {
    T top = mine.top;
#pragma unroll
    for (int k = 0; k < width; ++k) top = u[k] > top ? u[k] : top;
    mine = merge.raised(mine, top);
    if (p.c.smoothing != 0) add_smoothed(p, u, top, j, step, merge.weigh_gap, mine);
    mine.sum += exponentials(u, top);
  });
  return mine;
}

// Adds the values and slopes of some of the other classes.
template <class S, int N>
CP_DEVICE void add_off(const RowInput<S>& p, const computed_t<S> (&u)[N], computed_t<S> shift, Two<computed_t<S>>& to) {
  using T = computed_t<S>;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (!(u[k] > -math::infinity<T>)) continue;
    T value, slope;
    math::fading_other(u[k] - shift, p.c.gamma_neg.value, p.c.detach, value, slope);
    to.first += value;
    to.second += slope;
  }
}

template <bool Packs, class S>
CP_DEVICE Two<computed_t<S>> off_of(const RowInput<S>& p, const RowGroup& who, int64_t row, computed_t<S> shift) {
  using T = computed_t<S>;
  Two<T> mine{0, 0};
  for_classes<Packs>(p, who, row, 0, p.classes,
                     [&](const T(&u)[row_width<S>], int, int) { add_off(p, u, shift, mine); });
  return mine;
}

template <class S>
CP_DEVICE math::RowSums<computed_t<S>> sums_of(const RowInput<S>& p, int64_t row, bool counts, computed_t<S> target,
                                               computed_t<S> top, const RowShare<computed_t<S>>& all) {
  using T = computed_t<S>;
  return {top, all.sum, target - top, counts ? p.weight(p.target[row]) : T(0), all.live, all.weight, all.gap, 0, 0};
}

template <class T>
CP_DEVICE math::RowSlopes<T> scaled(const math::RowSlopes<T>& s, T by) {
  return {s.loss, s.top, s.log_total, s.exponent * by, s.label * by, s.target * by};
}

template <class T>
CP_DEVICE void write_slopes(const math::RowSlopes<T>& s, int64_t row, T* losses, T* state) {
  losses[row] = s.loss;
  state += row * row_state;
  state[0] = s.top;
  state[1] = s.log_total;
  state[2] = s.exponent;
  state[3] = s.label;
  state[4] = s.target;
}

template <class S, bool Packs>
__global__ void __launch_bounds__(row_threads, row_resident)
    rows_forward(RowInput<S> p, computed_t<S>* losses, computed_t<S>* state) {
  using T = computed_t<S>;
  __shared__ RowShare<T> share_scratch[warp_size];
  __shared__ Two<T> off_scratch[warp_size];
  const RowGroup who(p.lanes);
  const MergeRows merge{p.c.kind == math::RowKind::cross_entropy};
  for (int64_t base = who.base; base < p.rows; base += who.stride) {
    const int64_t row = base + who.index;
    const bool counts = row < p.rows && p.counts(row);
    RowShare<T> all = MergeRows::none<RowShare<T>>();
    if (counts) all = share_of<Packs>(p, who, row, merge);
    all = who.reduce(all, merge, share_scratch);
    const T target = counts ? p.at_target(row) : T(0), top = target > all.top ? target : all.top;
    all = merge.raised(all, top);
    math::RowSums<T> s = sums_of(p, row, counts, target, top, all);
    if (p.has_off()) {
      const T shift = top + math::row_terms(s, p.c.smoothing).log_total;
      Two<T> off{0, 0};
      if (counts) off = off_of<Packs>(p, who, row, shift);
      off = who.reduce(off, Add(), off_scratch);
      s.off_value = off.first;
      s.off_slope = off.second;
    }
    if (who.rank != 0 || row >= p.rows) continue;
    write_slopes(counts ? math::row_slopes(s, p.c) : math::RowSlopes<T>{}, row, losses, state);
  }
}

// What smoothing adds to the slope of a class that is not masked.
template <class S, class T>
CP_DEVICE T smoothed_slope(const RowInput<S>& p, T u, int j, const math::RowSlopes<T>& s) {
  if (p.c.kind == math::RowKind::cross_entropy) return s.label * p.weight(j);
  if (p.c.kind == math::RowKind::focal) return s.label;
  T value, slope;
  math::fading_other(u - s.top - s.log_total, p.c.gamma_neg.value, p.c.detach, value, slope);
  return s.label * slope;
}

template <bool Packs, class Input, class T, int N>
CP_DEVICE void times_factors(const Input& p, int j, int step, int to, T (&slopes)[N]) {
  if (p.multiplicative == nullptr) return;
  T factor[N];
  read_classes<Packs>(p.multiplicative, j, step, to, T(1), factor);
#pragma unroll
  for (int k = 0; k < N; ++k) slopes[k] *= factor[k];
}

// Exponentials to slopes of the logits; u: the adjusted logits where there is smoothing.
template <bool Packs, class S, class T, int N>
CP_DEVICE void slopes_of(const RowInput<S>& p, const math::RowSlopes<T>& s, int y, const T (&u)[N], int j, int step, int to,
                         T (&e)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) e[k] *= s.exponent;
  if (p.c.smoothing != 0) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (u[k] > -math::infinity<T>) e[k] += smoothed_slope(p, u[k], j + k * step, s);
  }
  put_at<Packs>(y, s.target, j, step, e);
  times_factors<Packs>(p, j, step, to, e);
}

template <class S, bool Packs>
__global__ void __launch_bounds__(row_threads, row_resident)
    rows_gradient(RowInput<S> p, const computed_t<S>* state, const computed_t<S>* by_row, S* grad) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  const RowGroup who(p.lanes);
  const int64_t slices = (p.classes + row_slice - 1) / row_slice;
  for (int64_t item = who.base + who.index; item < p.rows * slices; item += who.stride) {
    const int64_t row = item / slices;
    const int from = static_cast<int>(item % slices) * row_slice, to = p.classes - from < row_slice ? p.classes : from + row_slice;
    const bool counts = p.counts(row);
    const T* its = state + row * row_state;
    const auto s = scaled(math::RowSlopes<T>{0, its[0], its[1], its[2], its[3], its[4]}, by_row[row] * p.scale);
    const int y = static_cast<int>(p.target[row]);
    for_classes<Packs>(p, who, row, from, to, [&](const T(&u)[width], int j, int step) {
      T g[width];
#pragma unroll
      for (int k = 0; k < width; ++k) g[k] = counts ? u[k] : T(0);
      if (counts) {
        exponentials(g, s.top);
        slopes_of<Packs>(p, s, y, u, j, step, to, g);
      }
      write_classes<Packs>(g, grad + row * p.classes, j, step, to);
    });
  }
}

// ---- the total --------------------------------------------------------------------------------------------------

enum class RowDivisor : int { number, count, weight, foreground };

template <class T>
struct RowTotal {
  T* losses;        // (rows); null = only the divisor is wanted
  const T* weight;  // (rows), null = ones
  RowDivisor kind;
  double number;
  Two<double>* partials;
  T *total, *factor;
  double* divisor;
};

template <class T>
CP_DEVICE void write_total(const Two<double>& all, const RowTotal<T>& out) {
  double divisor = out.number;
  if (out.kind == RowDivisor::weight) divisor = all.second != 0 ? all.second : 1.0;
  if (out.kind == RowDivisor::count || out.kind == RowDivisor::foreground) divisor = all.second > 1 ? all.second : 1.0;
  *out.total = static_cast<T>(all.first / divisor);
  *out.divisor = divisor;
}

template <class S>
__global__ void __launch_bounds__(row_threads) rows_share_total(RowInput<S> p, RowTotal<computed_t<S>> out) {
  __shared__ Two<double> scratch[warp_size];
  Two<double> mine{0, 0};
  for (int64_t i = grid_first(); i < p.rows; i += grid_stride()) {
    if (!p.counts(i)) continue;
    const int64_t y = p.target[i];
    const double w = out.weight == nullptr ? 1.0 : static_cast<double>(out.weight[i]);
    if (out.losses != nullptr) mine.first += w * static_cast<double>(out.losses[i]);
    if (y < 0 || y >= p.classes) continue;  // what the row's own pass stops at
    mine.second += out.kind == RowDivisor::weight       ? w * static_cast<double>(p.weight(y))
                   : out.kind == RowDivisor::foreground ? (y > 0 ? 1.0 : 0.0)
                                                        : 1.0;
  }
  give_share(mine, out.partials, scratch, [&](const Two<double>& all) { write_total(all, out); });
}

template <class T>
__global__ void __launch_bounds__(row_threads) rows_conclude(RowTotal<T> out, int partials) {
  __shared__ Two<double> scratch[warp_size];
  add_shares(out.partials, partials, scratch, [&](const Two<double>& all) { write_total(all, out); });
}

template <class T>
__global__ void __launch_bounds__(row_threads) rows_factor(RowTotal<T> out, int64_t rows) {
  const double divisor = *out.divisor;
  for (int64_t i = grid_first(); i < rows; i += grid_stride())
    out.factor[i] = static_cast<T>((out.weight == nullptr ? 1.0 : static_cast<double>(out.weight[i])) / divisor);
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Threads that share a row.
template <class S>
int row_lanes(int64_t classes) {
  if (classes > row_of_warp) return row_threads;
  int lanes = 1;
  while (lanes < warp_size && lanes * row_width<S> < classes) lanes *= 2;
  return lanes;
}

inline int row_block(int lanes) { return lanes > row_threads ? lanes : row_threads; }

template <class S>
RowInput<S> row_input(const RowProblem& p, const void* grad) {
  using T = computed_t<S>;
  constexpr int width = row_width<S>;
  const bool packs = takes_packs<S, width>(p.logits, p.classes) && takes_packs<S, width>(grad, p.classes) &&
                     takes_packs<T, width>(p.additive) && takes_packs<T, width>(p.multiplicative);
  return {static_cast<const S*>(p.logits),
          p.target,
          p.mask,
          static_cast<const T*>(p.additive),
          static_cast<const T*>(p.multiplicative),
          static_cast<const T*>(p.margin),
          static_cast<const T*>(p.class_weight),
          p.rows,
          p.ignore_index,
          static_cast<int>(p.classes),
          static_cast<T>(p.scale),
          packs,
          row_lanes<S>(p.classes),
          {static_cast<math::RowKind>(p.kind), math::exponent<T>(p.gamma_pos), math::exponent<T>(p.gamma_neg),
           static_cast<T>(p.smoothing), p.detach}};
}

inline Launch row_launch(int64_t groups, int lanes, int64_t most, void* stream) {
  const int threads = row_block(lanes);
  const int64_t blocks = (groups * lanes + threads - 1) / threads;
  return {blocks < 1 ? 1 : (blocks < most ? blocks : most), threads, stream};
}

template <class S>
void rows_forward_on(const RowProblem& p, void* losses, void* state, void* stream) {
  using T = computed_t<S>;
  const RowInput<S> input = row_input<S>(p, nullptr);
  launch(input.packs ? rows_forward<S, true> : rows_forward<S, false>, row_launch(p.rows, input.lanes, row_most_blocks, stream), input, static_cast<T*>(losses),
         static_cast<T*>(state));
}

template <class S>
void rows_gradient_on(const RowProblem& p, const void* state, const void* by_row, void* grad, void* stream) {
  using T = computed_t<S>;
  const RowInput<S> input = row_input<S>(p, grad);
  const int64_t slices = (p.classes + row_slice - 1) / row_slice;
  launch(input.packs ? rows_gradient<S, true> : rows_gradient<S, false>, row_launch(p.rows * slices, input.lanes, row_most_blocks, stream), input,
         static_cast<const T*>(state), static_cast<const T*>(by_row), static_cast<S*>(grad));
}

// `partials` holds 2 * row_partials + 1 doubles.
template <class T>
RowTotal<T> row_total(void* losses, const void* weight, int kind, double number, void* partials, void* total,
                      void* factor) {
  auto* sums = static_cast<Two<double>*>(partials);
  return {static_cast<T*>(losses),       static_cast<const T*>(weight), static_cast<RowDivisor>(kind), number, sums,
          static_cast<T*>(total), static_cast<T*>(factor),       reinterpret_cast<double*>(sums + row_partials)};
}

// The total and the divisor.
template <class S>
void add_up_rows(const RowInput<S>& p, const RowTotal<computed_t<S>>& out, void* stream) {
  const Launch over_rows = row_launch(p.rows, 1, row_partials, stream);
  launch(rows_share_total<S>, over_rows, p, out);
  if (over_rows.blocks == 1) return;
  launch(rows_conclude<computed_t<S>>, Launch{1, row_threads, stream}, out, static_cast<int>(over_rows.blocks));
}

template <class S>
void rows_total_on(const RowProblem& p, void* losses, const void* weight, int kind, double number, void* partials,
                   void* total, void* factor, void* stream) {
  const auto out = row_total<computed_t<S>>(losses, weight, kind, number, partials, total, factor);
  add_up_rows(row_input<S>(p, nullptr), out, stream);
  launch(rows_factor<computed_t<S>>, row_launch(p.rows, 1, row_partials, stream), out, p.rows);
}

}  // namespace counterpoise::cuda

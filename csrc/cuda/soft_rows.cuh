// Row-wise family with distributions as targets, after the pattern of rows.cuh: the forward pass reads a row's logits
// and targets once (targets that are logits twice) and leaves five numbers, from which the backward pass makes the
// gradient in one more pass.
#pragma once

#include "../cpu/soft_rows.h"
#include "../math/soft_rows.h"
#include "rows.cuh"

namespace counterpoise::cuda {

// Logits of type S; targets of type Y, which is S or what is computed in.
template <class S, class Y>
struct SoftRowInput {
  using T = computed_t<S>;
  const S* logits;
  const Y* target;
  const uint8_t* mask;
  const T *multiplicative, *additive, *margin, *class_weight;
  int64_t rows;
  int classes;
  T scale, smoothing, target_scale;
  bool divergence;
  bool packs;  // whether every row, and what goes with its classes, may be read and written in packs
  int lanes;   // threads that share a row: a power of two in a warp, or the block

  CP_DEVICE bool counts(int64_t row) const { return mask == nullptr || mask[row] != 0; }
  CP_DEVICE T weight(int64_t j) const { return class_weight == nullptr ? T(1) : class_weight[j]; }
};

// Sums over some of a row's classes, see math::SoftRowSums; relative to zero where all of them are masked.
template <class T>
struct SoftRowShare {
  T top, total, mass, dot, live, live_weight, gap;
};

template <class T>
CP_DEVICE SoftRowShare<T> across(SoftRowShare<T> x, int distance) {
  return {across(x.top, distance),  across(x.total, distance),       across(x.mass, distance), across(x.dot, distance),
          across(x.live, distance), across(x.live_weight, distance), across(x.gap, distance)};
}

struct MergeSoftRows {
  template <class R>
  static CP_DEVICE R none() {
    return R{-math::infinity<decltype(R::top)>, 0, 0, 0, 0, 0, 0};
  }
  // The share as it would be relative to a top that is no lower.
  template <class T>
  CP_DEVICE SoftRowShare<T> raised(SoftRowShare<T> x, T top) const {
    const T by = x.top - top;
    if (x.top != top && x.top > -math::infinity<T>) {
      x.total *= math::exp(by);
      x.dot += math::vanishing(x.mass, by);
      x.gap += x.live > 0 ? x.live_weight * by : T(0);
    }
    x.top = top;
    return x;
  }
  template <class T>
  CP_DEVICE SoftRowShare<T> operator()(const SoftRowShare<T>& a, const SoftRowShare<T>& b) const {
    const T top = a.top > b.top ? a.top : b.top;
    const SoftRowShare<T> x = raised(a, top), y = raised(b, top);
    return {top,
            x.total + y.total,
            x.mass + y.mass,
            x.dot + y.dot,
            x.live + y.live,
            x.live_weight + y.live_weight,
            x.gap + y.gap};
  }
};

template <class S, class Y>
CP_DEVICE math::TargetSoftmax<computed_t<S>> target_softmax(const SoftRowInput<S, Y>& p, const RowGroup& who,
                                                            int64_t row, bool counts, LogSum<computed_t<S>>* scratch) {
  using T = computed_t<S>;
  if (p.target_scale == 0) return {0, 1};
  LogSum<T> mine = Merge::none<LogSum<T>>();
#pragma unroll 4  // so that several loads are under way before the first is used
  for (int64_t j = counts ? who.rank : p.classes; j < p.classes; j += who.lanes)
    mine = Merge()(mine, LogSum<T>{static_cast<T>(widen(p.target[row * p.classes + j])) * p.target_scale, 1});
  const LogSum<T> all = who.reduce(mine, Merge(), scratch);
  return {all.largest, 1 / all.sum};
}

// The targets of some classes, zero beyond them.
template <bool Packs, class S, class Y, class T, int N>
CP_DEVICE void read_targets(const SoftRowInput<S, Y>& p, int64_t row, const math::TargetSoftmax<T>& of_target, int j,
                            int step, int to, T (&t)[N]) {
  const T beyond = p.target_scale == 0 ? T(0) : -math::infinity<T>;
  read_classes<Packs>(p.target + row * p.classes, j, step, to, beyond, t);
  if (p.target_scale == 0) return;
#pragma unroll
  for (int k = 0; k < N; ++k) t[k] = of_target.factor * math::exp(t[k] * p.target_scale - of_target.top);
}

// visit(adjusted logits, targets, first class, distance) for all that this thread has of classes [from, to); what lies
// beyond is given as a masked class with target zero.
template <bool Packs, class S, class Y, class F>
CP_DEVICE void for_soft_classes(const SoftRowInput<S, Y>& p, const RowGroup& who, int64_t row, int from, int to,
                                const math::TargetSoftmax<computed_t<S>>& of_target, F&& visit) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  const S* z = p.logits + row * p.classes;
  const int step = Packs ? 1 : who.lanes;
#pragma unroll 2  // so that several loads are under way before the first is used
  for (int j = from + who.rank * (Packs ? width : 1); j < to; j += who.lanes * width) {
    T u[width], t[width];
    read_classes<Packs>(z, j, step, to, -math::infinity<T>, u);
    read_targets<Packs>(p, row, of_target, j, step, to, t);
    shift<Packs>(p, j, step, to, u);
    if (p.margin != nullptr) {
      T margin[width];
      read_classes<Packs>(p.margin, j, step, to, T(0), margin);
#pragma unroll
      for (int k = 0; k < width; ++k) u[k] = multiply_add(-margin[k], t[k], u[k]);
    }
    stretch(p.scale, u);
    visit(u, t, j, step);
  }
}

// ---- sums of a row ----------------------------------------------------------------------------------------------

// What some classes add to the sums, relative to `base`. Most losses ask for the first three alone.
template <class S, class Y, class T, int N>
CP_DEVICE SoftRowShare<T> soft_sums_of(const SoftRowInput<S, Y>& p, const T (&u)[N], const T (&t)[N], T base, int j,
                                       int step) {
  SoftRowShare<T> pack{};
  if (p.smoothing == 0 && !p.divergence && p.class_weight == nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const T below = u[k] - base;
      pack.total += math::exp(below);
      pack.mass += t[k];
      pack.dot += math::vanishing(t[k], below);
    }
    return pack;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const T below = u[k] - base;
    const bool live = p.smoothing != 0 && u[k] > -math::infinity<T>;
    pack.total += math::exp(below);
    const T w = t[k] != 0 || live ? p.weight(j + k * step) : T(0), a = w * t[k];
    pack.mass += a;
    pack.dot += math::vanishing(a, p.divergence ? below - math::log_of_target(t[k]) : below);
    pack.live += live ? T(1) : T(0);
    pack.live_weight += live ? w : T(0);
    pack.gap += live ? w * below : T(0);
  }
  return pack;
}

// With `kept` the adjusted logits are put there.
template <bool Packs, class S, class Y>
CP_DEVICE SoftRowShare<computed_t<S>> soft_share_of(const SoftRowInput<S, Y>& p, const RowGroup& who, int64_t row,
                                                    const math::TargetSoftmax<computed_t<S>>& of_target,
                                                    computed_t<S>* kept = nullptr) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  SoftRowShare<T> mine = MergeSoftRows::none<SoftRowShare<T>>();
  bool bad = false;
  for_soft_classes<Packs>(p, who, row, 0, p.classes, of_target, [&](const T(&u)[width], const T(&t)[width], int j, int step) {
    if (kept != nullptr) write_classes<Packs>(u, kept, j, step, p.classes);
    T top = mine.top;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      top = u[k] > top ? u[k] : top;
      bad |= !(t[k] >= 0 && t[k] <= 1);
    }
    mine = MergeSoftRows().raised(mine, top);
    const T base = top > -math::infinity<T> ? top : T(0);  // inf - inf would be NaN
    const SoftRowShare<T> pack = soft_sums_of(p, u, t, base, j, step);  // a sum of few sums rounds less
    mine = {top,
            mine.total + pack.total,
            mine.mass + pack.mass,
            mine.dot + pack.dot,
            mine.live + pack.live,
            mine.live_weight + pack.live_weight,
            mine.gap + pack.gap};
  });
  if (bad && p.target_scale == 0) stop("target holds a value outside [0, 1]");
  return mine;
}

template <class T>
CP_DEVICE void write_soft_slopes(const math::SoftRowSlopes<T>& s, const math::TargetSoftmax<T>& of_target, int64_t row,
                                 T* losses, T* state) {
  losses[row] = s.loss;
  state += row * soft_row_state;
  state[0] = s.top;
  state[1] = s.exponent;
  state[2] = s.share;
  state[3] = of_target.top;
  state[4] = of_target.factor;
}

template <class S, class Y, bool Packs>
__global__ void __launch_bounds__(row_threads, row_resident)
    soft_rows_forward(SoftRowInput<S, Y> p, computed_t<S>* losses, computed_t<S>* state) {
  using T = computed_t<S>;
  __shared__ SoftRowShare<T> scratch[warp_size];
  __shared__ LogSum<T> target_scratch[warp_size];
  const RowGroup who(p.lanes);
  for (int64_t base = who.base; base < p.rows; base += who.stride) {
    const int64_t row = base + who.index;
    const bool counts = row < p.rows && p.counts(row);
    math::TargetSoftmax<T> of_target = target_softmax(p, who, row, counts, target_scratch);
    SoftRowShare<T> s = MergeSoftRows::none<SoftRowShare<T>>();
    if (counts) s = soft_share_of<Packs>(p, who, row, of_target);
    s = who.reduce(s, MergeSoftRows(), scratch);
    if (who.rank != 0 || row >= p.rows) continue;
    const math::SoftRowSums<T> sums{s.top, s.total, s.mass, s.dot, s.live, s.live_weight, s.gap};
    if (!counts) of_target = {};
    write_soft_slopes(counts ? math::soft_row_slopes(sums, p.smoothing) : math::SoftRowSlopes<T>{}, of_target, row,
                      losses, state);
  }
}

// What the gradient of a row is made of.
template <class T>
struct SoftSlopes {
  T top, exponent, share, by;
};

// Adjusted logits and targets of some classes to slopes of the logits.
template <bool Packs, class S, class Y, class T, int N>
CP_DEVICE void soft_slopes_of(const SoftRowInput<S, Y>& p, const SoftSlopes<T>& s, const T (&u)[N], const T (&t)[N],
                              int j, int step, int to, T (&g)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T a = t[k];
    if (p.smoothing != 0) a = (1 - p.smoothing) * t[k] + (u[k] > -math::infinity<T> ? s.share : T(0));
    if (p.class_weight != nullptr && (Packs || j + k * step < to)) a *= p.class_weight[j + k * step];
    g[k] = (s.exponent * math::exp(u[k] - s.top) - a) * s.by;
  }
  times_factors<Packs>(p, j, step, to, g);
}

template <class S, class Y, bool Packs>
__global__ void __launch_bounds__(row_threads, row_resident)
    soft_rows_gradient(SoftRowInput<S, Y> p, const computed_t<S>* state, const computed_t<S>* by_row, S* grad) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  const RowGroup who(p.lanes);
  const int64_t slices = (p.classes + row_slice - 1) / row_slice;
  for (int64_t item = who.base + who.index; item < p.rows * slices; item += who.stride) {
    const int64_t row = item / slices;
    const int from = static_cast<int>(item % slices) * row_slice;
    const int to = p.classes - from < row_slice ? p.classes : from + row_slice;
    const bool counts = p.counts(row);
    const T* its = state + row * soft_row_state;
    const SoftSlopes<T> s{its[0], its[1], its[2], by_row[row] * p.scale};
    const math::TargetSoftmax<T> of_target{its[3], its[4]};
    for_soft_classes<Packs>(p, who, row, from, to, of_target, [&](const T(&u)[width], const T(&t)[width], int j, int step) {
      T g[width] = {};
      if (counts) soft_slopes_of<Packs>(p, s, u, t, j, step, to, g);
      write_classes<Packs>(g, grad + row * p.classes, j, step, to);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(row_threads)
    soft_rows_share_total(const uint8_t* mask, int64_t rows, RowTotal<T> out) {
  __shared__ Two<double> scratch[warp_size];
  Two<double> mine{0, 0};
  for (int64_t i = grid_first(); i < rows; i += grid_stride()) {
    if (mask != nullptr && mask[i] == 0) continue;
    const double w = out.weight == nullptr ? 1.0 : static_cast<double>(out.weight[i]);
    if (out.losses != nullptr) mine.first += w * static_cast<double>(out.losses[i]);
    mine.second += out.kind == RowDivisor::weight ? w : 1.0;
  }
  give_share(mine, out.partials, scratch, [&](const Two<double>& all) { write_total(all, out); });
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Calls f with null pointers of the storage types of logits and targets.
template <class F>
void with_soft_types(const SoftRowProblem& p, F&& f) {
  with_float_type(p.logits_type, [&](auto* s) {
    if (p.target_type == p.logits_type) {
      f(s, s);
    } else {
      f(s, static_cast<const computed_t<std::remove_const_t<std::remove_pointer_t<decltype(s)>>>*>(nullptr));
    }
  });
}

template <class S, class Y>
SoftRowInput<S, Y> soft_row_input(const SoftRowProblem& p, const void* grad) {
  using T = computed_t<S>;
  constexpr int width = row_width<S>;
  const bool packs = takes_packs<S, width>(p.logits, p.classes) && takes_packs<Y, width>(p.target, p.classes) &&
                     takes_packs<S, width>(grad, p.classes) && takes_packs<T, width>(p.additive) &&
                     takes_packs<T, width>(p.multiplicative) && takes_packs<T, width>(p.margin);
  return {static_cast<const S*>(p.logits),
          static_cast<const Y*>(p.target),
          p.mask,
          static_cast<const T*>(p.multiplicative),
          static_cast<const T*>(p.additive),
          static_cast<const T*>(p.margin),
          static_cast<const T*>(p.class_weight),
          p.rows,
          static_cast<int>(p.classes),
          static_cast<T>(p.scale),
          static_cast<T>(p.smoothing),
          static_cast<T>(p.target_scale),
          p.divergence,
          packs,
          row_lanes<S>(p.classes)};
}

template <class S, class Y>
void soft_rows_forward_on(const SoftRowProblem& p, void* losses, void* state, void* stream) {
  using T = computed_t<S>;
  const SoftRowInput<S, Y> input = soft_row_input<S, Y>(p, nullptr);
  launch(input.packs ? soft_rows_forward<S, Y, true> : soft_rows_forward<S, Y, false>, row_launch(p.rows, input.lanes, row_most_blocks, stream), input,
         static_cast<T*>(losses), static_cast<T*>(state));
}

template <class S, class Y>
void soft_rows_gradient_on(const SoftRowProblem& p, const void* state, const void* by_row, void* grad, void* stream) {
  using T = computed_t<S>;
  const SoftRowInput<S, Y> input = soft_row_input<S, Y>(p, grad);
  const int64_t slices = (p.classes + row_slice - 1) / row_slice;
  launch(input.packs ? soft_rows_gradient<S, Y, true> : soft_rows_gradient<S, Y, false>, row_launch(p.rows * slices, input.lanes, row_most_blocks, stream), input,
         static_cast<const T*>(state), static_cast<const T*>(by_row), static_cast<S*>(grad));
}

// The total and the divisor.
template <class T>
void add_up_soft_rows(const SoftRowProblem& p, const RowTotal<T>& out, void* stream) {
  const Launch over_rows = row_launch(p.rows, 1, row_partials, stream);
  launch(soft_rows_share_total<T>, over_rows, p.mask, p.rows, out);
  if (over_rows.blocks == 1) return;
  launch(rows_conclude<T>, Launch{1, row_threads, stream}, out, static_cast<int>(over_rows.blocks));
}

// T is what is computed in.
template <class T>
void soft_rows_total_on(const SoftRowProblem& p, void* losses, const void* weight, int kind, double number,
                        void* partials, void* total, void* factor, void* stream) {
  const auto out = row_total<T>(losses, weight, kind, number, partials, total, factor);
  add_up_soft_rows(p, out, stream);
  launch(rows_factor<T>, row_launch(p.rows, 1, row_partials, stream), out, p.rows);
}

}  // namespace counterpoise::cuda

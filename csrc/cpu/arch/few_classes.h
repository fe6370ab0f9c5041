// Row-wise family, rows of few classes: sixteen rows side by side, each in a lane of its own, so that nothing is added
// up across lanes and the formulas of a row are vector code too. Entry [c * lanes + i] of a block is class c of row i.
#pragma once

#include "../rows.h"

#include "../../math/rows.h"
#include "types.h"

namespace counterpoise::CP_ARCH {

constexpr int64_t few_classes = 64;

// Logits of `count` rows from `row` on; lanes without a row, or whose row does not count, hold zeros.
template <class T>
using Gather = void (*)(const RowProblem&, int64_t row, int64_t count, T* u);

template <class S, class T>
void gather(const RowProblem& p, int64_t row, int64_t count, T* __restrict u) {
  const S* __restrict z = static_cast<const S*>(p.logits) + row * p.classes;
  for (int64_t i = 0; i < lanes; ++i, z += p.classes) {
    const bool counts = i < count && row_counts(p, row + i);
    for (int64_t c = 0; c < p.classes; ++c) u[c * lanes + i] = counts ? static_cast<T>(widen(z[c])) : T(0);
  }
}

// Gradients of `count` rows, in the logits' type.
template <class T>
using Scatter = void (*)(const T* g, int64_t row, int64_t count, int64_t classes, void* grad);

template <class S, class T>
void scatter(const T* __restrict g, int64_t row, int64_t count, int64_t classes, void* grad) {
  S* __restrict to = static_cast<S*>(grad) + row * classes;
  for (int64_t i = 0; i < count; ++i, to += classes)
    for (int64_t c = 0; c < classes; ++c) to[c] = Narrow<S>::from(g[c * lanes + i]);
}

// Numbers of sixteen rows.
template <class T>
struct alignas(64) Lanes {
  T of[lanes];
  T& operator[](int64_t i) { return of[i]; }
  const T& operator[](int64_t i) const { return of[i]; }
};

template <class T>
struct RowsInLanes {
  const RowProblem& p;
  math::RowParameters<T> c;
  const T *multiplicative, *additive, *margin, *class_weight;
  Gather<T> gather;
  Scatter<T> scatter;

  alignas(64) T u[few_classes * lanes], e[few_classes * lanes];
  int64_t y[lanes];
  bool counts[lanes];
  Lanes<T> top, others, target, weight, live, live_weight, gap;
  Lanes<T> loss, log_total, exponent, label, target_slope;

  RowsInLanes(const RowProblem& problem, const math::RowParameters<T>& parameters, Gather<T> reads, Scatter<T> writes)
      : p(problem),
        c(parameters),
        multiplicative(static_cast<const T*>(p.multiplicative)),
        additive(static_cast<const T*>(p.additive)),
        margin(static_cast<const T*>(p.margin)),
        class_weight(static_cast<const T*>(p.class_weight)),
        gather(reads),
        scatter(writes) {}

  void load(int64_t row, int64_t count) {
    gather(p, row, count, u);
    for (int64_t i = 0; i < lanes; ++i) {
      counts[i] = i < count && row_counts(p, row + i);
      y[i] = counts[i] ? p.target[row + i] : 0;
    }
    adjust();
    const T scale = static_cast<T>(p.scale);
    for (int64_t i = 0; i < lanes; ++i) {
      T& at_target = u[y[i] * lanes + i];
      target[i] = margin == nullptr ? at_target : at_target - margin[y[i]] * scale;
      weight[i] = class_weight == nullptr ? T(1) : class_weight[y[i]];
      at_target = -math::infinity<T>;
    }
  }

  void adjust() {
    if (multiplicative == nullptr && additive == nullptr && p.scale == 1) return;
    const T scale = static_cast<T>(p.scale);
    for (int64_t c = 0; c < p.classes; ++c) {
      const T d = multiplicative == nullptr ? T(1) : multiplicative[c], a = additive == nullptr ? T(0) : additive[c];
      for (int64_t i = 0; i < lanes; ++i) u[c * lanes + i] = (u[c * lanes + i] * d + a) * scale;
    }
  }

  void add_up() {
    top = target;
    for (int64_t c = 0; c < p.classes; ++c)
      for (int64_t i = 0; i < lanes; ++i) top[i] = u[c * lanes + i] > top[i] ? u[c * lanes + i] : top[i];
    Lanes<T> shift;
    for (int64_t i = 0; i < lanes; ++i) shift[i] = top[i] == -math::infinity<T> ? T(0) : top[i];
    others = {};
    for (int64_t c = 0; c < p.classes; ++c)
      for (int64_t i = 0; i < lanes; ++i) {
        const T x = math::exp_of_negative(u[c * lanes + i] - shift[i]);
        e[c * lanes + i] = x;
        others[i] += x;
      }
    live = live_weight = gap = {};
    if (this->c.smoothing != 0) add_labels();
  }

  // Number, weights and gaps below the top of the classes that are not masked.
  void add_labels() {
    const bool weigh_gap = this->c.kind == math::RowKind::cross_entropy;
    for (int64_t c = 0; c < p.classes; ++c) {
      const T w = class_weight == nullptr ? T(1) : class_weight[c], in_gap = weigh_gap ? w : T(1);
      for (int64_t i = 0; i < lanes; ++i) {
        const T x = u[c * lanes + i];
        const bool here = x > -math::infinity<T>;
        live[i] += here ? T(1) : T(0);
        live_weight[i] += here ? w : T(0);
        gap[i] += here ? in_gap * (x - top[i]) : T(0);
      }
    }
  }

  void evaluate() {
    for (int64_t i = 0; i < lanes; ++i) {
      const math::RowSums<T> sums = {top[i],         others[i], target[i] - top[i], weight[i], live[i],
                                     live_weight[i], gap[i],    T(0),               T(0)};
      const math::RowSlopes<T> s = math::row_slopes(sums, c);
      loss[i] = s.loss;
      log_total[i] = s.log_total;
      exponent[i] = s.exponent;
      label[i] = s.label;
      target_slope[i] = s.target;
    }
  }

  // What becomes of a row that counts, zeros for one that does not.
  void keep(int64_t row, int64_t count, T* losses, T* state) const {
    for (int64_t i = 0; i < count; ++i) {
      losses[row + i] = counts[i] ? loss[i] : T(0);
      if (state == nullptr) continue;
      const T numbers[row_state] = {top[i], log_total[i], exponent[i], label[i], target_slope[i]};
      for (int64_t j = 0; j < row_state; ++j) state[(row + i) * row_state + j] = counts[i] ? numbers[j] : T(0);
    }
  }

  // The exponentials become gradients; times as in the loop over long rows.
  void differentiate(int64_t row, const T* w, T scale) {
    Lanes<T> per_label, least;
    for (int64_t i = 0; i < lanes; ++i) {
      const T own = w == nullptr || !counts[i] ? T(1) : w[row + i];
      const T factor = counts[i] ? scale * own * static_cast<T>(p.scale) : T(0);
      exponent[i] *= factor;
      per_label[i] = label[i] * factor;
      target_slope[i] *= factor;
      least[i] = least_for(exponent[i]);
    }
    const bool weigh = this->c.kind == math::RowKind::cross_entropy && class_weight != nullptr;
    for (int64_t c = 0; c < p.classes; ++c) {
      const T d = weigh ? class_weight[c] : T(1);
      for (int64_t i = 0; i < lanes; ++i) {
        const T smoothed = u[c * lanes + i] > -math::infinity<T> ? per_label[i] * d : T(0);
        e[c * lanes + i] = times(e[c * lanes + i], exponent[i], least[i]) + smoothed;
      }
    }
    for (int64_t i = 0; i < lanes; ++i) e[y[i] * lanes + i] = target_slope[i];
    if (multiplicative == nullptr) return;
    for (int64_t c = 0; c < p.classes; ++c)
      for (int64_t i = 0; i < lanes; ++i) e[c * lanes + i] *= multiplicative[c];
  }

  void run(int64_t begin, int64_t end, const T* w, T scale, T* losses, T* state, void* grad) {
    for (int64_t row = begin; row < end; row += lanes) {
      const int64_t count = end - row < lanes ? end - row : lanes;
      load(row, count);
      add_up();
      evaluate();
      keep(row, count, losses, state);
      if (grad == nullptr) continue;
      differentiate(row, w, scale);
      scatter(e, row, count, p.classes, grad);
    }
  }
};

}  // namespace counterpoise::CP_ARCH

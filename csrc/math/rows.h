// Softmax losses of one row: value, and what the gradient with respect to its adjusted logits u is made of.
//
// With y the target and e_c = exp(u_c - top), the slope of every other class that is not masked is
//
//     exponent * e_c + label * (class weight, one, or fading_other's slope, by kind)
//
// and that of y stands in `target`. Sums over the other classes leave y out, so that 1 - p_y is never a difference.
// The plain PyTorch forms and the sources stand in counterpoise/losses/{adjusted_cross_entropy,softmax_focal,
// asymmetric_single_label}.py.
#pragma once

#include "primitives.h"

namespace counterpoise::math {

enum class RowKind : int { cross_entropy = 0, focal = 1, asymmetric = 2 };

template <class T>
struct RowParameters {
  RowKind kind;
  Exponent<T> gamma_pos, gamma_neg;  // focal: both its gamma; cross-entropy: none
  T smoothing;
  bool detach;  // asymmetric: no derivative of the focusing factors
};

template <class T>
struct RowSums {
  T top;     // the largest u
  T others;  // sum of e_c over the other classes
  T target;  // u_y - top
  T weight;  // class weight of y
  // With smoothing only, over the other classes that are not masked:
  T live, live_weight;  // their number, the sum of their class weights
  T gap;                // sum of (u_c - top), times the class weights for cross-entropy
  // Asymmetric with smoothing only: sums of fading_other.
  T off_value, off_slope;
};

template <class T>
struct RowSlopes {
  T loss, top, log_total, exponent, label, target;
};

// log(1 + x) for x >= 0.
template <class T>
CP_INLINE T log1p_positive(T x) {
  return x < 1 ? log1p_unit(x).log : log(1 + x);
}

// 0 * inf = 0: a label's weight of zero, or a probability that underflowed, times a logarithm.
template <class T>
CP_INLINE T vanishing(T p, T x) {
  return p == 0 ? T(0) : p * x;
}

template <class T>
CP_INLINE T focus_of(T base, const Exponent<T>& gamma) {
  return gamma.whole >= 0 ? power<whole_power>(base, T(0), gamma) : power<any_power>(base, log(base), gamma);
}

// p^gamma (-log p) of another class and its derivative with respect to log p.
template <class T>
CP_INLINE void fading_other(T log_p, T gamma, bool detach, T& value, T& slope) {
  const T focus = exp(gamma * log_p);
  value = -focus * log_p;
  slope = detach ? -focus : -focus * (1 + gamma * log_p);
}

// What every kind needs of the sums.
template <class T>
struct RowTerms {
  T total, p, q;  // sum of all e, p_y, 1 - p_y
  T log_total, loss;  // loss: -log p_y
  T share;        // label mass of each class that is not masked
  bool target_live;
};

template <class T>
CP_INLINE RowTerms<T> row_terms(const RowSums<T>& s, T smoothing) {
  const T e = exp(s.target), total = s.others + e;
  const bool live = s.target > -infinity<T>;
  const T share = smoothing == 0 ? T(0) : smoothing / (s.live + (live ? 1 : 0));
  return {total, e / total, s.others / total, log(total), log1p_positive(s.others + (e - 1)) - s.target, share, live};
}

template <class T>
CP_INLINE RowSlopes<T> row_cross_entropy(const RowSums<T>& s, const RowTerms<T>& t, T smoothing) {
  if (smoothing == 0) return {s.weight * t.loss, s.top, t.log_total, s.weight / t.total, 0, -s.weight * t.q};
  const T own = t.target_live ? t.share * s.weight : T(0);
  const T hard = (1 - smoothing) * s.weight + own, rest = t.share * s.live_weight;
  return {vanishing(hard, t.loss) + t.share * (s.live_weight * t.log_total - s.gap),
          s.top, t.log_total, (hard + rest) / t.total, -t.share, rest * t.p - hard * t.q};
}

template <class T>
CP_INLINE RowSlopes<T> row_focal(const RowSums<T>& s, const RowTerms<T>& t, const RowParameters<T>& c) {
  T factor = s.weight, entropy = t.loss, miss = t.q, hard = 1, own = 0;
  if (c.smoothing != 0) {
    hard = 1 - c.smoothing;
    own = t.target_live ? t.share : T(0);
    factor = (hard + own) * s.weight + t.share * s.live_weight;
    entropy = vanishing(hard + own, t.loss) + t.share * (s.live * t.log_total - s.gap);
    miss = hard * t.q + (c.smoothing - t.share);
  }
  const T focus = focus_of(miss, c.gamma_pos);
  const T moved = miss > 0 ? c.gamma_pos.value * focus / miss * hard * vanishing(t.p, entropy) : T(0);
  return {factor * focus * entropy,
          s.top,
          t.log_total,
          factor * (focus + moved) / t.total,
          -factor * focus * t.share,
          factor * (focus * (c.smoothing - own - t.q) - moved * t.q)};
}

template <class T>
CP_INLINE RowSlopes<T> row_asymmetric(const RowSums<T>& s, const RowTerms<T>& t, const RowParameters<T>& c) {
  const T hard = 1 - c.smoothing + t.share;
  const T focus = focus_of(t.q, c.gamma_pos);
  const T moved = t.q > 0 && !c.detach ? c.gamma_pos.value * focus / t.q * vanishing(t.p, t.loss) : T(0);
  const T off = t.share * s.off_slope;
  return {s.weight * (hard * focus * t.loss + t.share * s.off_value),
          s.top,
          t.log_total,
          s.weight * (hard * (focus + moved) - off) / t.total,
          s.weight * t.share,
          s.weight * (-hard * (focus + moved) * t.q - off * t.p)};
}

template <class T>
CP_INLINE RowSlopes<T> row_slopes(const RowSums<T>& s, const RowParameters<T>& c) {
  const RowTerms<T> t = row_terms(s, c.smoothing);
  if (c.kind == RowKind::focal) return row_focal(s, t, c);
  if (c.kind == RowKind::asymmetric) return row_asymmetric(s, t, c);
  return row_cross_entropy(s, t, c.smoothing);
}

}  // namespace counterpoise::math

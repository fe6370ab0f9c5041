// Cross-entropy of one row whose target is a distribution: value, and what the gradient with respect to its adjusted
// logits u is made of.
//
// With t the target, w the class weights and e_c = exp(u_c - top), the slope of class c is
//
//     exponent * e_c - w_c ((1 - smoothing) t_c + share)          the share for classes that are not masked alone
//
// The plain PyTorch form stands in counterpoise/losses/adjusted_cross_entropy.py.
#pragma once

#include "rows.h"

namespace counterpoise::math {

template <class T>
struct SoftRowSums {
  T top;         // the largest u
  T total;       // sum of e_c
  T mass, dot;   // sums of w_c t_c and of w_c t_c (u_c - top); for a divergence, less w_c t_c log t_c
  // With smoothing only, over the classes that are not masked: their number, sums of w_c and of w_c (u_c - top).
  T live, live_weight, gap;
};

template <class T>
struct SoftRowSlopes {
  T loss, top, exponent, share;
};

// Of a target that is given as logits v: t_c = factor * exp(v_c - top).
template <class T>
struct TargetSoftmax {
  T top, factor;
};

template <class T>
CP_INLINE SoftRowSlopes<T> soft_row_slopes(const SoftRowSums<T>& s, T smoothing) {
  const T share = smoothing == 0 ? T(0) : smoothing / s.live, hard = 1 - smoothing;
  const T mass = hard * s.mass + share * s.live_weight;
  const T dot = smoothing == 0 ? s.dot : vanishing(hard, s.dot) + share * s.gap;
  return {vanishing(mass, log(s.total)) - dot, s.top, mass / s.total, share};
}

// log t as a factor of t: of zero and of what is next to it, the smallest number's.
template <class T>
CP_INLINE T log_of_target(T t) {
  return log(at_least(std::numeric_limits<T>::min(), t));
}

}  // namespace counterpoise::math

// Losses of independent labels at one element: value and derivative with respect to the logit z.
//
// t is the label, 0 or 1 in the hard forms and in between in the soft ones. The plain PyTorch forms and the sources
// stand in counterpoise/losses/{sigmoid_focal,sigmoid_focal_star,asymmetric}.py.
#pragma once

#include "primitives.h"

namespace counterpoise::math {

enum class BinaryKind : int { focal = 0, asymmetric = 1, focal_star = 2 };

template <class T>
struct BinaryParameters {
  Exponent<T> gamma_pos, gamma_neg;  // focal: both its gamma; focal*: value = gamma
  T alpha_pos, alpha_neg;            // factors of positives and negatives
  T margin;                          // asymmetric
  T log_eps;                         // asymmetric: lower bound of the logarithms, -infinity = none
  T beta;                            // focal*
  bool detach;                       // asymmetric: no derivative of the focusing factor
};

template <class T>
struct ValueSlope {
  T value, slope;
};

// What every form needs of u: e^-|u|, the two softplus values and the two probabilities.
template <class T>
struct Sigmoid {
  T p, q;        // sigmoid(u), sigmoid(-u)
  T lose, gain;  // -log p, -log q
};

template <bool Finite = false, class T>
CP_INLINE Sigmoid<T> sigmoid(T u) {
  const T size = std::abs(u);
  const T e = exp_of_negative<Finite>(-size);
  const auto [tail, r] = log1p_unit(e);
  const T small = e * r;
  const bool up = u >= 0;
  return {up ? r : small, up ? small : r, (up ? T(0) : size) + tail, (up ? size : T(0)) + tail};
}

// 0 * inf = 0: a probability that underflowed, times the logarithm of another. Finite logits need no such care.
template <bool Finite, class T>
CP_INLINE T fading(T p, T x) {
  return !Finite && p == 0 ? T(0) : p * x;
}

// alpha_t q^gamma (-log p) with p = sigmoid(u), u = (2t - 1) z; d/du = -q^gamma (q + gamma p (-log p)). Binary
// cross-entropy is gamma = 0.
template <int P, bool Finite, class T>
CP_INLINE ValueSlope<T> focal_hard(T z, T t, const BinaryParameters<T>& c) {
  const bool positive = t > 0;
  const Sigmoid<T> s = sigmoid<Finite>(positive ? z : -z);
  const T alpha = positive ? c.alpha_pos : c.alpha_neg, sign = 2 * t - 1;
  if constexpr (P == 0) return {alpha * s.lose, -sign * alpha * s.q};
  const T focus = alpha * power<P>(s.q, -s.gain, c.gamma_pos);
  return {focus * s.lose, -sign * focus * (s.q + c.gamma_pos.value * fading<Finite>(s.p, s.lose))};
}

template <int P, class T>
CP_INLINE ValueSlope<T> focal_soft(T z, T t, const BinaryParameters<T>& c) {
  const Sigmoid<T> s = sigmoid(z);
  const T alpha = c.alpha_pos * t + c.alpha_neg * (1 - t);
  const T entropy = t * s.lose + (1 - t) * s.gain;
  if constexpr (P == 0) return {alpha * entropy, alpha * (s.p - t)};
  const T miss = t * s.q + (1 - t) * s.p;  // 1 - p_t, never less than min(t, 1 - t)
  const T focus = alpha * power<any_power>(miss, log(miss), c.gamma_pos);
  return {focus * entropy, focus * ((s.p - t) + c.gamma_pos.value * (1 - 2 * t) * s.p * s.q / miss * entropy)};
}

// softplus(-(gamma u + beta)) / gamma.
template <class T>
CP_INLINE ValueSlope<T> focal_star(T z, T t, const BinaryParameters<T>& c) {
  const T sign = 2 * t - 1, gamma = c.gamma_pos.value;
  const T alpha = c.alpha_pos * t + c.alpha_neg * (1 - t);
  const Sigmoid<T> s = sigmoid(gamma * sign * z + c.beta);
  return {alpha * s.lose / gamma, -alpha * sign * s.q};
}

// Positives: q^gamma_pos (-log p). Negatives: p_m^gamma_neg (-log(1 - p_m)) with p_m = max(p - margin, 0).
// A term that is clamped at log_eps has no slope of its own.
template <int P, int N, bool Margin, bool Finite, class T>
CP_INLINE ValueSlope<T> asymmetric_hard(T z, T t, const BinaryParameters<T>& c) {
  const Sigmoid<T> s = sigmoid<Finite>(z);
  const T moves = c.detach ? T(0) : T(1);
  const bool one_clamped = -s.lose < c.log_eps;
  const T one = one_clamped ? -c.log_eps : s.lose;
  const T focus_one = power<P>(s.q, -s.gain, c.gamma_pos);
  const T slope_one = -focus_one * ((one_clamped ? T(0) : s.q) + moves * c.gamma_pos.value * fading<Finite>(s.p, one));

  T zero, focus_zero, slope_zero;
  if constexpr (Margin) {
    const T shifted = s.p - c.margin;
    const bool below = shifted <= 0;
    const T p_m = below ? T(0.5) : shifted;
    const T not_p_m = below ? T(0.5) : s.q + c.margin;
    const T loss = -log_complement(p_m, not_p_m);
    const bool clamped = -loss < c.log_eps;
    zero = clamped ? -c.log_eps : loss;
    T log_p_m = 0;
    if constexpr (N == any_power) log_p_m = log(p_m);
    focus_zero = power<N>(p_m, log_p_m, c.gamma_neg);
    // 1 / (1 - p_m) + gamma zero / p_m over one denominator
    const T inner = ((clamped ? T(0) : p_m) + moves * c.gamma_neg.value * zero * not_p_m) / (p_m * not_p_m);
    slope_zero = below ? T(0) : s.p * s.q * focus_zero * inner;
    zero = below ? T(0) : zero;
  } else {
    const bool clamped = -s.gain < c.log_eps;
    zero = clamped ? -c.log_eps : s.gain;
    focus_zero = power<N>(s.p, -s.lose, c.gamma_neg);
    slope_zero = focus_zero * ((clamped ? T(0) : s.p) + moves * c.gamma_neg.value * fading<Finite>(s.q, zero));
  }
  const bool positive = t > 0;
  const T value = positive ? focus_one * one : focus_zero * zero;
  const T slope = positive ? slope_one : slope_zero;
  // The margin and the clamp bound the loss: what is not finite would come out finite.
  const bool bounded = !Finite && (Margin || c.log_eps > -infinity<T>);
  return {!bounded || z < infinity<T> ? value : std::numeric_limits<T>::quiet_NaN(), slope};
}

template <class T>
CP_INLINE ValueSlope<T> asymmetric_soft(T z, T t, const BinaryParameters<T>& c) {
  const Sigmoid<T> s = sigmoid(z);
  const T shifted = s.p - c.margin;
  const bool below = c.margin > 0 && shifted <= 0;
  const T p_m = below ? T(0) : (c.margin > 0 ? shifted : s.p);
  const T of_zero = c.margin > 0 ? (below ? T(0) : -log_complement(p_m, s.q + c.margin)) : s.gain;
  const bool one_clamped = -s.lose < c.log_eps, zero_clamped = -of_zero < c.log_eps;
  const T one = one_clamped ? -c.log_eps : s.lose, zero = zero_clamped ? -c.log_eps : of_zero;
  const T slope_one = one_clamped ? T(0) : -s.q;
  const T slope_zero = below || zero_clamped ? T(0) : (c.margin > 0 ? s.p * s.q / (1 - p_m) : s.p);
  const T entropy = t * one + (1 - t) * zero, slope = t * slope_one + (1 - t) * slope_zero;
  const T miss = t * s.q + (1 - t) * p_m;
  const T gamma = c.gamma_pos.value * t + c.gamma_neg.value * (1 - t);
  const T focus = gamma == 0 ? T(1) : exp(gamma * log(miss));
  const T miss_slope = s.p * s.q * ((below ? T(0) : 1 - t) - t);
  const T moved = c.detach || gamma == 0 ? T(0) : gamma * focus * (miss_slope / miss) * entropy;
  const bool bounded = c.margin > 0 || c.log_eps > -infinity<T>;
  const T value = focus * entropy;
  return {!bounded || z < infinity<T> ? value : std::numeric_limits<T>::quiet_NaN(), focus * slope + moved};
}

// P and N say what is known of the exponents of positives and negatives, see power(); `Finite` that no logit is infinite
// or NaN.
template <BinaryKind Kind, int P, int N, bool Margin, bool Finite, class T>
CP_INLINE ValueSlope<T> binary_hard(T z, T t, const BinaryParameters<T>& c) {
  if constexpr (Kind == BinaryKind::focal) return focal_hard<P, Finite>(z, t, c);
  if constexpr (Kind == BinaryKind::asymmetric) return asymmetric_hard<P, N, Margin, Finite>(z, t, c);
  if constexpr (Kind == BinaryKind::focal_star) return focal_star(z, t, c);
}

template <BinaryKind Kind, int P, class T>
CP_INLINE ValueSlope<T> binary_soft(T z, T t, const BinaryParameters<T>& c) {
  if constexpr (Kind == BinaryKind::focal) return focal_soft<P>(z, t, c);
  if constexpr (Kind == BinaryKind::asymmetric) return asymmetric_soft(z, t, c);
  if constexpr (Kind == BinaryKind::focal_star) return focal_star(z, t, c);
}

// Cross-entropy whose positive part counts pi times is that of another label, times what is returned: with w = pi t +
// (1 - t) it is w times the one of pi t / w. A hard label stays what it is.
template <class T>
CP_INLINE T weigh_positive(T pi, T& t) {
  const T w = pi * t + (1 - t);
  t = w > 0 ? pi * t / w : t;
  return w;
}

}  // namespace counterpoise::math

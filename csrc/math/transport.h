// Entropic transport: what a potential becomes, given the sums of the kernel on its side; as counterpoise/ot/_sides.py
// has it, whose names are used here.
#pragma once

#include "primitives.h"

namespace counterpoise::math {

// e^x without a branch or a call, for loops over doubles; to a few units in the last place. 0 below -708, infinity
// above 709.
CP_INLINE double exp_in_loop(double x) {
#if CP_ON_DEVICE
  return ::exp(x);
#else
  constexpr double low = -708.0, high = 709.0, round = 6755399441055744.0;  // adding 1.5 * 2^52 rounds to an integer
  const double c = at_most(high, at_least(low, x));
  const double shifted = c * 1.44269504088896340736 + round;
  const double n = shifted - round;
  const double r = (c - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800;  // Taylor's series, at |r| <= ln 2 / 2
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  const uint64_t bits = (__builtin_bit_cast(uint64_t, shifted) + 1023u) << 52;
  const double y = p * __builtin_bit_cast(double, bits);
  return x < low ? 0.0 : (x > high ? infinity<double> : y);
#endif
}

CP_INLINE float exp_in_loop(float x) { return exp(x); }

// A sum to divide by: entries without mass have sum 0, and nothing to divide.
template <class T>
CP_INLINE T divisor(T sum, T mass) {
  return mass == 0 ? sum + T(1) : sum;
}

// (potential - offset) / epsilon of an entry; `pull` is 1 / (penalty + epsilon), 0 where exact, and `ceiling` infinity
// where there is none.
template <class T>
CP_INLINE T log_scaling(T log_ratio, T log_sum, T pull, T epsilon, T offset, T ceiling) {
  const T moved = (1 - epsilon * pull) * (log_ratio - log_sum) - pull * offset;
  return at_most((ceiling - offset) / epsilon, moved);
}

// A cost: given, or from a product of points and the squares of both, which rounding may leave below 0.
template <bool Points, class T>
CP_INLINE T transport_cost(T entry, T of_row, T of_column) {
  return Points ? at_least(T(0), entry + (of_row + of_column)) : entry;
}

}  // namespace counterpoise::math

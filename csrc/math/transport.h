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

constexpr int newton_steps = 3;  // of a ceiling, in every iteration

// A Newton step of a ceiling, in units of epsilon and no lower than `floor`: at `now` the plan holds `held` of its
// `amount`, of which `slope` grows with the ceiling. T is the type in which these were summed up.
template <class T>
CP_INLINE double next_level(double now, double floor, double amount, double held, double slope) {
  constexpr double eps = std::numeric_limits<T>::epsilon(), tiny = std::numeric_limits<T>::min();
  const double missing = amount - held, rounding = 4 * eps * amount;
  const double rest = missing <= rounding && missing >= -rounding ? 0.0 : missing;
  const double growth = 1 + rest / (slope > tiny ? slope : tiny);
  const double next = growth > 0 ? now + log(growth) : floor;
  return next > floor ? next : floor;
}

// log of the mass that an entry with this potential has, minus infinity where it is exact.
template <class T>
CP_INLINE T free_log_mass(T mass, T potential, T penalty) {
  const T x = log(mass) - potential / penalty;
  return penalty == infinity<T> ? -infinity<T> : x;
}

CP_INLINE double log_add_exp(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  if (a != a || b != b) return a + b;
  return high == -infinity<double> || high == low ? high + (high == low ? log(2.0) : 0.0)
                                                  : high + log1p_unit(exp(low - high)).log;
}

// The common shift of the potentials, by what both sides' masses differ in logarithms; none where that is no number.
template <class T>
CP_INLINE T common_shift(double length, double log_rows, double log_columns) {
  const double found = length * (log_rows - log_columns);
  return found - found == 0 ? static_cast<T>(found) : T(0);
}

// A cost: given, or from a product of points and the squares of both, which rounding may leave below 0.
template <bool Points, class T>
CP_INLINE T transport_cost(T entry, T of_row, T of_column) {
  return Points ? at_least(T(0), entry + (of_row + of_column)) : entry;
}

}  // namespace counterpoise::math

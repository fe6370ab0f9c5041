// The scalar functions in which the formulas are written, for both back ends.
//
// On the host, float versions have no branch and no table, so that a loop over them becomes vector code; errors are a
// few units in the last place. On a device and for double the standard library serves.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define CP_INLINE __host__ __device__ __forceinline__
#else
#define CP_INLINE inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define CP_ON_DEVICE 1
#else
#define CP_ON_DEVICE 0
#endif

namespace counterpoise::math {

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

// Comparisons are ordered so that NaN passes through as the second argument.
template <class T>
CP_INLINE T at_least(T low, T x) {
  return x < low ? low : x;
}

template <class T>
CP_INLINE T at_most(T high, T x) {
  return x > high ? high : x;
}

CP_INLINE double exp(double x) { return ::exp(x); }
CP_INLINE double log(double x) { return ::log(x); }

#if !CP_ON_DEVICE
// A polynomial in x, the highest coefficient first.
template <class... Rest>
CP_INLINE float polynomial(float x, float p, Rest... rest) {
  ((p = p * x + rest), ...);
  return p;
}

// e^r times 2^n, where n + 127 stands in the low bits of `shifted`, for |r| <= ln 2 / 2. 0 for n = -127.
CP_INLINE float exp_of_remainder(float r, float shifted) {
  const float p = polynomial(r, 0.0013814527774229646f, 0.008368744514882565f, 0.04166839271783829f,
                             0.1666652113199234f, 0.4999999403953552f, 1.0f, 1.0f);
  return p * __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, shifted) << 23);
}

// e^x for x in [-88, 88.7].
CP_INLINE float exp_within(float x) {
  constexpr float round = 12582912.0f + 127.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float shifted = x * 1.44269504088896341f + round;
  const float n = shifted - round;
  return exp_of_remainder((x - n * 0.693359375f) + n * 2.12194440e-4f, shifted);
}
#endif

// e^x: 2^n times a minimax polynomial (3e-9) on [-ln 2 / 2, ln 2 / 2]. 0 below -87.7, infinity above 88.7.
CP_INLINE float exp(float x) {
#if CP_ON_DEVICE
  return ::expf(x);
#else
  constexpr float low = -88.0f, high = 88.7f;
  const float y = exp_within(at_most(high, at_least(low, x)));
  return x > high ? infinity<float> : y;
#endif
}

// e^x for x <= 0, but for rounding: without what only large x need. Where no x is NaN (`Finite`) the bits, of which the
// larger are those of the smaller x, are compared instead: one instruction less.
template <bool Finite = false>
CP_INLINE double exp_of_negative(double x) {
  return ::exp(x);
}

template <bool Finite = false>
CP_INLINE float exp_of_negative(float x) {
#if CP_ON_DEVICE
  return ::expf(x);
#else
  constexpr float low = -88.0f;
  if constexpr (!Finite) return exp_within(at_least(low, x));
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), most = __builtin_bit_cast(uint32_t, low);
  return exp_within(__builtin_bit_cast(float, bits < most ? bits : most));
#endif
}

// log(1 + x) and 1 / (1 + x) for x in [0, 1]. The logarithm is x times a minimax polynomial (3e-8).
template <class T>
struct LogReciprocal {
  T log, reciprocal;
};

CP_INLINE LogReciprocal<double> log1p_unit(double x) { return {::log1p(x), 1.0 / (1.0 + x)}; }

CP_INLINE LogReciprocal<float> log1p_unit(float x) {
#if CP_ON_DEVICE
  return {::log1pf(x), 1.0f / (1.0f + x)};
#else
  const float p = polynomial(x, 0.005364819f, -0.030065773f, 0.07920451f, -0.137538f, 0.19153655f, -0.24857163f,
                             0.33321324f, -0.49999648f, 1.0f);
  return {x * p, 1.0f / (1.0f + x)};
#endif
}

// log(x) of a normal, finite x > 0.
CP_INLINE float log_of_normal(float x) {
#if CP_ON_DEVICE
  return ::logf(x);
#else
  // 2^n m with m in [sqrt(1/2), sqrt(2)); the logarithm of m is r = m - 1 times a minimax polynomial (3e-8).
  const uint32_t bits = __builtin_bit_cast(uint32_t, x) - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = __builtin_bit_cast(float, (bits & 0x007fffffu) + 0x3f3504f3u);
  const float r = m - 1.0f;
  const float p = polynomial(r, 0.08734846f, -0.14307527f, 0.14917974f, -0.16570507f, 0.19962072f, -0.25001755f,
                             0.3333395f, -0.4999999f, 1.0f);
  return n * 0.693359375f + (p * r - n * 2.12194440e-4f);
#endif
}

// log(x) of a normal x > 0; -infinity at 0 and for subnormal x. NaN for x < 0.
CP_INLINE float log(float x) {
#if CP_ON_DEVICE
  return ::logf(x);
#else
  const float of_zero = x < 0 ? std::numeric_limits<float>::quiet_NaN() : -infinity<float>;
  const float y = log_of_normal(x);
  return x < std::numeric_limits<float>::min() ? of_zero : (x < infinity<float> ? y : x);
#endif
}

// log(1 - x) for x in [0, 1), given also 1 - x as it came about, normal: in float its logarithm is no worse.
CP_INLINE double log_complement(double x, double) { return ::log1p(-x); }
CP_INLINE float log_complement(float, float complement) { return log_of_normal(complement); }

// An exponent >= 0. Whole numbers up to 7 are products of squares, chosen without a branch.
template <class T>
struct Exponent {
  T value;
  int whole;  // the value, if it is whole and at most 7; else -1
};

template <class T>
inline Exponent<T> exponent(double value) {
  const int whole = value >= 0 && value <= 7 ? static_cast<int>(value) : -1;
  return {static_cast<T>(value), whole == value ? whole : -1};
}

constexpr int any_power = -2, whole_power = -1;

// base^g for base in [0, 1], of which the logarithm is at hand. P says what is known of g: nothing, that it is whole and
// at most 7, or (0 and more) the number itself.
template <int P, class T>
CP_INLINE T power(T base, T log_base, const Exponent<T>& g) {
  const T square = base * base;
  if constexpr (P == any_power) {
    return g.value == 0 ? T(1) : exp(g.value * log_base);
  } else if constexpr (P == whole_power) {
    return (g.whole & 1 ? base : T(1)) * (g.whole & 2 ? square : T(1)) * (g.whole & 4 ? square * square : T(1));
  } else {
    return (P & 1 ? base : T(1)) * (P & 2 ? square : T(1)) * (P & 4 ? square * square : T(1));
  }
}

}  // namespace counterpoise::math

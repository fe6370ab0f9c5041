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
// e^r times the power of two that stands in the low bits of `shifted`, for |r| <= ln 2 / 2.
CP_INLINE float exp_of_remainder(float r, float shifted) {
  float p = 0.0013814527774229646f;
  p = p * r + 0.008368744514882565f;
  p = p * r + 0.04166839271783829f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * r * r + r + 1.0f;
  return p * __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23);
}
#endif

// e^x: 2^n times a minimax polynomial (3e-9) on [-ln 2 / 2, ln 2 / 2]. 0 below -87.3, infinity above 88.7.
CP_INLINE float exp(float x) {
#if CP_ON_DEVICE
  return ::expf(x);
#else
  constexpr float low = -87.3f, high = 88.7f, round = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float c = at_most(high, at_least(low, x));
  const float shifted = c * 1.44269504088896341f + round;
  const float n = shifted - round;
  const float y = exp_of_remainder((c - n * 0.693359375f) + n * 2.12194440e-4f, shifted);
  return x < low ? 0.0f : (x > high ? infinity<float> : y);
#endif
}

CP_INLINE double exp_of_negative(double x) { return ::exp(x); }

// e^x for x <= 0: without what only large x need.
CP_INLINE float exp_of_negative(float x) {
#if CP_ON_DEVICE
  return ::expf(x);
#else
  constexpr float low = -87.3f, round = 12582912.0f;
  const float c = at_least(low, x);
  const float shifted = c * 1.44269504088896341f + round;
  const float n = shifted - round;
  const float y = exp_of_remainder((c - n * 0.693359375f) + n * 2.12194440e-4f, shifted);
  return x < low ? 0.0f : y;
#endif
}

// log(1 + x) and 1 / (1 + x) for x in [0, 1]. The logarithm is 2 artanh(s) with s = x / (2 + x) in [0, 1/3], a
// minimax polynomial (5e-9); both quotients share a division, which costs as much as a dozen multiplications.
template <class T>
struct LogReciprocal {
  T log, reciprocal;
};

CP_INLINE LogReciprocal<double> log1p_unit(double x) { return {::log1p(x), 1.0 / (1.0 + x)}; }

CP_INLINE LogReciprocal<float> log1p_unit(float x) {
#if CP_ON_DEVICE
  return {::log1pf(x), 1.0f / (1.0f + x)};
#else
  const float a = 1.0f + x, b = 2.0f + x, d = 1.0f / (a * b);
  const float s = x * (d * a);
  const float q = s * s;
  float p = 0.14012126624584198f;
  p = p * q + 0.13999590277671814f;
  p = p * q + 0.20010848343372345f;
  p = p * q + 0.3333320617675781f;
  return {2 * s + 2 * s * q * p, d * b};
#endif
}

// log(x) of a normal x > 0; -infinity at 0 and for subnormal x. NaN for x < 0.
CP_INLINE float log(float x) {
#if CP_ON_DEVICE
  return ::logf(x);
#else
  // 2^n m with m in [sqrt(1/2), sqrt(2)), and a polynomial in m - 1 (Cephes).
  const uint32_t bits = __builtin_bit_cast(uint32_t, x) - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float m = __builtin_bit_cast(float, (bits & 0x007fffffu) + 0x3f3504f3u);
  const float r = m - 1.0f;
  const float q = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float y = n * 0.693359375f + (r + ((p * r * q - n * 2.12194440e-4f) - 0.5f * q));
  const float of_zero = x < 0 ? std::numeric_limits<float>::quiet_NaN() : -infinity<float>;
  return x < std::numeric_limits<float>::min() ? of_zero : (x < infinity<float> ? y : x);
#endif
}

// log(1 - x) for x in [0, 1), given also 1 - x as it came about: in float its logarithm is no worse.
CP_INLINE double log_complement(double x, double) { return ::log1p(-x); }
CP_INLINE float log_complement(float, float complement) { return log(complement); }

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

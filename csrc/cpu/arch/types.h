// Reading and writing the storage types; everything is computed in float, or in double for double.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../math/primitives.h"
#include "../capability.h"

namespace counterpoise::CP_ARCH {

struct bfloat16 {
  uint16_t bits;
};

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
CP_INLINE Bits<T> bits(T x) {
  return __builtin_bit_cast(Bits<T>, x);
}

CP_INLINE float widen(float x) { return x; }
CP_INLINE double widen(double x) { return x; }
CP_INLINE float widen(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
CP_INLINE float widen(_Float16 x) { return static_cast<float>(x); }
CP_INLINE float widen(uint8_t x) { return static_cast<float>(x); }
CP_INLINE float widen(int64_t x) { return static_cast<float>(x); }

template <class S>
struct Narrow {
  template <class T>
  static CP_INLINE S from(T x) {
    return static_cast<S>(x);
  }
};

template <>
struct Narrow<bfloat16> {
  // To nearest, ties to even; NaN stays NaN.
  static CP_INLINE bfloat16 from(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
  }
};

template <class S>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};

// Calls f with a null pointer of the storage type.
template <class F>
auto with_float_type(Type type, F&& f) {
  switch (type) {
    case Type::float64: return f(static_cast<const double*>(nullptr));
    case Type::bfloat16: return f(static_cast<const bfloat16*>(nullptr));
    case Type::float16: return f(static_cast<const _Float16*>(nullptr));
    default: return f(static_cast<const float*>(nullptr));
  }
}

template <class F>
auto with_type(Type type, F&& f) {
  switch (type) {
    case Type::uint8: return f(static_cast<const uint8_t*>(nullptr));
    case Type::int64: return f(static_cast<const int64_t*>(nullptr));
    default: return with_float_type(type, f);
  }
}

template <class T, class S>
CP_INLINE void load(const S* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i]));
}

template <class S, class T>
CP_INLINE void store(const T* from, int64_t n, S* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Narrow<S>::from(from[i]);
}

// Values [at, at + n) of x as T: where they lie if that is their type, else converted into the buffer.
template <class T>
const T* in_place(const void* x, Type type, int64_t at, int64_t n, T* buffer) {
  return with_type(type, [&](auto* s) -> const T* {
    const auto* from = static_cast<decltype(s)>(x) + at;
    if constexpr (std::is_same_v<decltype(from), const T*>) return from;
    load(from, n, buffer);
    return buffer;
  });
}

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// A register: the compiler takes wider vectors apart number by number wherever they are compared.
template <class T>
struct Wide {
  typedef T type __attribute__((vector_size(vector_bytes)));
  static constexpr int64_t width = vector_bytes / sizeof(T);
};

constexpr int64_t lanes = 16;  // numbers that are added up apart, whatever the registers hold

// join(part, next) over sixteen numbers at a time, in registers; then the halves joined, down to one.
template <class T, class F>
CP_INLINE T fold(const T* x, int64_t n, T start, const F& join) {
  using V = typename Wide<T>::type;
  constexpr int64_t width = Wide<T>::width, parts = lanes / width;
  V part[parts];
  for (auto& p : part) p = V{} + start;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t g = 0; g < parts; ++g) {
      V next;
      __builtin_memcpy(&next, x + i + g * width, sizeof(next));
      part[g] = join(part[g], next);
    }
  T rest = start;
  for (; i < n; ++i) rest = join(rest, x[i]);
  alignas(64) T each[lanes];
  __builtin_memcpy(each, part, sizeof(each));
  for (int64_t k = lanes / 2; k > 0; k /= 2)
    for (int64_t j = 0; j < k; ++j) each[j] = join(each[j], each[j + k]);
  return join(rest, each[0]);
}

template <class T>
CP_INLINE T sum(const T* x, int64_t n) {
  return fold(x, n, T(0), [](const auto& a, const auto& b) { return a + b; });
}

// The largest; NaN is passed over.
template <class T>
CP_INLINE T largest(const T* x, int64_t n) {
  return fold(x, n, -math::infinity<T>, [](const auto& a, const auto& b) { return b > a ? b : a; });
}

// Writes past the caches: a line is not read before it is written, and turns nothing out.
template <class S>
CP_INLINE void stream(const S* from, int64_t n, S* to) {
  int64_t i = 0;
#if defined(__SSE2__)
  constexpr int64_t step = vector_bytes / sizeof(S);
  while (i < n && reinterpret_cast<uintptr_t>(to + i) % vector_bytes != 0) to[i] = from[i], ++i;
  for (; i + step <= n; i += step) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  }
#endif
  for (; i < n; ++i) to[i] = from[i];
}

// Before another thread may read what was streamed.
CP_INLINE void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// x * factor, 0 where that would be subnormal: such products are slow, and nothing beside a row's largest slope.
template <class T>
CP_INLINE T times(T x, T factor, T least) {
  return ((x < 0 ? -x : x) < least ? T(0) : x) * factor;
}

template <class T>
CP_INLINE T least_for(T factor) {
  return std::numeric_limits<T>::min() / (factor < 0 ? -factor : factor);
}

}  // namespace counterpoise::CP_ARCH

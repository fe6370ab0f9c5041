// Reading and writing the storage types; everything is computed in float, or in double for double.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../../math/primitives.h"
#include "../capability.h"

namespace counterpoise::CP_ARCH {

struct bfloat16 {
  uint16_t bits;
};

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

// Sixteen numbers side by side, where the compiler does not see by itself that a loop of sixteen is one.
constexpr int64_t lanes = 16;

template <class T>
struct Wide {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};

// x[k], x[k + 1], ... in the first places.
template <int K, class V>
CP_INLINE void shift_down(V& x) {
  using Index = decltype(x < x);
  Index at;
  for (int64_t i = 0; i < lanes; ++i) at[i] = (i + K) % lanes;
  x = __builtin_shuffle(x, at);
}

template <int K, class V, class F>
CP_INLINE void fold(V& x, const F& join) {
  V other = x;
  shift_down<K>(other);
  join(x, other);
  if constexpr (K > 1) fold<K / 2>(x, join);
}

// Sixteen partial sums, added in a fixed order.
template <class T>
CP_INLINE T sum(const T* x, int64_t n) {
  typename Wide<T>::type part = {}, next;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    __builtin_memcpy(&next, x + i, sizeof(next));
    part += next;
  }
  T total = 0;
  for (; i < n; ++i) total += x[i];
  fold<lanes / 2>(part, [](auto& a, const auto& b) { a += b; });
  return total + part[0];
}

// The largest; NaN is passed over.
template <class T>
CP_INLINE T largest(const T* x, int64_t n) {
  typename Wide<T>::type part = {}, next;
  part -= math::infinity<T>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    __builtin_memcpy(&next, x + i, sizeof(next));
    part = next > part ? next : part;
  }
  T most = -math::infinity<T>;
  for (; i < n; ++i) most = x[i] > most ? x[i] : most;
  fold<lanes / 2>(part, [](auto& a, const auto& b) { a = b > a ? b : a; });
  return part[0] > most ? part[0] : most;
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

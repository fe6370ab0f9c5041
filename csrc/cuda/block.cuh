// What the kernels of every family share: storage types, 16-byte loads and stores, sums over a warp and a block.
//
// Everything that only a GPU has is in the part for nvcc. The tests compile the kernels' own source with g++ as well:
// tests/kernels/emulation/cuda.h then takes the place of that part, with a thread of the host for each of a block.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../cpu/capability.h"
#include "../math/primitives.h"

#if defined(__CUDACC__)
#define CP_DEVICE __device__ __forceinline__
// Shared memory whose size the launch gives: CP_DYNAMIC_SHARED(float, tile) declares `float* tile`, 16-byte aligned.
#define CP_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char cp_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(cp_dynamic_shared)
#else
#define CP_DEVICE inline
#define CP_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(counterpoise::cuda::emulated_dynamic_shared())
#endif

namespace counterpoise::cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#if defined(__CUDACC__)

// Blocks and threads; `shared` bytes of dynamic shared memory.
struct Launch {
  int64_t blocks;
  int threads;
  void* stream;
  int shared = 0;
};

// Asks for all the shared memory that a block may have, so that every thread of the host asks for the same.
template <class... P>
void allow_shared_memory(void (*kernel)(P...), int bytes) {
  int device = 0, most = 0;
  cudaFuncAttributes of_kernel = {};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncGetAttributes(&of_kernel, kernel);
  most -= static_cast<int>(of_kernel.sharedSizeBytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most > bytes ? most : bytes);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& on, A... arguments) {
  constexpr int granted = 48 << 10;  // more has to be asked for
  if (on.shared > granted) allow_shared_memory(kernel, on.shared);
  kernel<<<static_cast<unsigned>(on.blocks), on.threads, on.shared, static_cast<cudaStream_t>(on.stream)>>>(
      static_cast<P>(arguments)...);
}

CP_DEVICE float float_of_half_bits(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

CP_DEVICE uint16_t half_bits_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Ends the program with an error of the device: data that no kernel can go on with.
CP_DEVICE void stop(const char* /* why */) { __trap(); }

#endif

// ---- storage types; everything is computed in float, or in double for double -----------------------------------

template <class S>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};
template <class S>
using computed_t = typename Computed<S>::type;

CP_DEVICE float widen(float x) { return x; }
CP_DEVICE double widen(double x) { return x; }
CP_DEVICE float widen(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
CP_DEVICE float widen(float16 x) { return float_of_half_bits(x.bits); }
CP_DEVICE float widen(uint8_t x) { return static_cast<float>(x); }
CP_DEVICE float widen(int64_t x) { return static_cast<float>(x); }

template <class S>
struct Narrow {
  template <class T>
  static CP_DEVICE S from(T x) {
    return static_cast<S>(x);
  }
};
template <>
struct Narrow<bfloat16> {
  // To nearest, ties to even; NaN stays NaN.
  static CP_DEVICE bfloat16 from(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
  }
};
template <>
struct Narrow<float16> {
  static CP_DEVICE float16 from(float x) { return {half_bits_of_float(x)}; }
};

// What a null pointer to a storage type points to.
template <class P>
using Stored = std::remove_const_t<std::remove_pointer_t<P>>;

// Calls f with a null pointer of the storage type.
template <class F>
void with_float_type(Type type, F&& f) {
  switch (type) {
    case Type::float64: return f(static_cast<const double*>(nullptr));
    case Type::bfloat16: return f(static_cast<const bfloat16*>(nullptr));
    case Type::float16: return f(static_cast<const float16*>(nullptr));
    default: return f(static_cast<const float*>(nullptr));
  }
}

// ---- loads and stores of 16 bytes -------------------------------------------------------------------------------

// How many values 16 bytes hold.
template <class S>
constexpr int pack_width = 16 / static_cast<int>(sizeof(S));

// N values that are read and written together, 16 bytes at a time where there are as many.
template <class S, int N>
struct alignas(sizeof(S) * N < 16 ? sizeof(S) * N : 16) Pack {
  S at[N];
};

// Whether packs of N may be taken at `pointer`; of each row, if rows of `row` values follow one another.
template <class S, int N>
inline bool takes_packs(const void* pointer, int64_t row = N) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Pack<S, N>) == 0 && row % N == 0;
}

template <int N, class T, class S>
CP_DEVICE void load_pack(const S* from, T (&to)[N]) {
  const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(from);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = static_cast<T>(widen(pack.at[k]));
}

template <int N, class S, class T>
CP_DEVICE void store_pack(const T (&from)[N], S* to) {
  Pack<S, N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) pack.at[k] = Narrow<S>::from(from[k]);
  *reinterpret_cast<Pack<S, N>*>(to) = pack;
}

// ---- products that are rounded by themselves --------------------------------------------------------------------
//
// Compilers fuse a product with a sum behind it in one place and not in another; a number that is made again must be
// the same to the last bit.

CP_DEVICE float multiply(float a, float b) {
#if CP_ON_DEVICE
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
CP_DEVICE double multiply(double a, double b) {
#if CP_ON_DEVICE
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
CP_DEVICE float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
CP_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

// ---- who am I, over a grid of one dimension ---------------------------------------------------------------------

CP_DEVICE int lane() { return static_cast<int>(threadIdx.x) % warp_size; }
CP_DEVICE int warp() { return static_cast<int>(threadIdx.x) / warp_size; }
CP_DEVICE int warps() { return static_cast<int>(blockDim.x) / warp_size; }

// for (int64_t i = grid_first(); i < n; i += grid_stride())
CP_DEVICE int64_t grid_first() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
CP_DEVICE int64_t grid_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// ---- reductions -------------------------------------------------------------------------------------------------
//
// Exchanges by exclusive or: after them every lane holds the same bits, because every combination below gives the same
// for (a, b) as for (b, a). Blocks are of whole warps, at most 32 of them, and all their threads take part.

// The logarithm of a sum of exponentials, as its largest exponent and the sum relative to it.
template <class T>
struct LogSum {
  T largest, sum;
};

// Two sums that are carried together.
template <class T>
struct Two {
  T first, second;
};

struct Add {
  template <class T>
  static CP_DEVICE T none() {
    return T{};
  }
  template <class T>
  CP_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
  template <class T>
  CP_DEVICE Two<T> operator()(Two<T> a, Two<T> b) const {
    return {a.first + b.first, a.second + b.second};
  }
};

// NaN if either is.
struct Larger {
  template <class T>
  static CP_DEVICE T none() {
    return -math::infinity<T>;
  }
  template <class T>
  CP_DEVICE T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Nothing at all is {-infinity, 0}, one exponent x is {x, 1}. +infinity stays +infinity, NaN stays NaN.
struct Merge {
  template <class T>
  static CP_DEVICE T none() {
    return T{-math::infinity<decltype(T::largest)>, 0};
  }
  template <class T>
  CP_DEVICE LogSum<T> operator()(LogSum<T> a, LogSum<T> b) const {
    const bool first = a.largest >= b.largest || a.largest != a.largest;
    const LogSum<T> high = first ? a : b, low = first ? b : a;
    // Equal exponents, both -infinity too, need no factor: inf - inf would be NaN.
    const T factor = low.largest == high.largest ? T(1) : math::exp(low.largest - high.largest);
    return {high.largest, low.sum == 0 && high.largest == high.largest ? high.sum : high.sum + low.sum * factor};
  }
};

template <class T>
CP_DEVICE T across(T x, int distance) {
  return __shfl_xor_sync(all_lanes, x, distance);
}
template <class T>
CP_DEVICE LogSum<T> across(LogSum<T> x, int distance) {
  return {across(x.largest, distance), across(x.sum, distance)};
}
template <class T>
CP_DEVICE Two<T> across(Two<T> x, int distance) {
  return {across(x.first, distance), across(x.second, distance)};
}

// Over groups of `lanes` neighbours, a power of two of at most 32; all threads of the warp take part.
template <class Combine, class T>
CP_DEVICE T warp_reduce(T x, Combine combine, int lanes = warp_size) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    if (distance < lanes) x = combine(x, across(x, distance));
  return x;
}

// Over the block, for every thread. `scratch` is shared memory for 32 values; it is free again on return.
template <class Combine, class T>
CP_DEVICE T block_reduce(T x, Combine combine, T* scratch) {
  x = warp_reduce(x, combine);
  if (lane() == 0) scratch[warp()] = x;
  __syncthreads();
  T all = lane() < warps() ? scratch[lane()] : Combine::template none<T>();
  all = warp_reduce(all, combine);
  __syncthreads();
  return all;
}

// ---- totals over a grid -----------------------------------------------------------------------------------------
//
// Each block leaves its share, and one block of a second kernel adds them in order; a grid of one block concludes at
// once. conclude(all) is called by one thread.

template <class F>
CP_DEVICE void give_share(const Two<double>& mine, Two<double>* shares, Two<double>* scratch, F&& conclude) {
  const Two<double> all = block_reduce(mine, Add(), scratch);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    conclude(all);
  } else {
    shares[blockIdx.x] = all;
  }
}

template <class F>
CP_DEVICE void add_shares(const Two<double>* shares, int count, Two<double>* scratch, F&& conclude) {
  Two<double> mine{0, 0};
  for (int i = threadIdx.x; i < count; i += blockDim.x) mine = Add()(mine, shares[i]);
  const Two<double> all = block_reduce(mine, Add(), scratch);
  if (threadIdx.x == 0) conclude(all);
}

}  // namespace counterpoise::cuda

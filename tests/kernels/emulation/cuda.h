// CUDA's built-ins on threads of the host, so that csrc/cuda/*.cuh compile with g++ as they stand.
//
// Blocks run one after another, the threads of a block at the same time, each a std::thread: a missing barrier is a race
// that ThreadSanitizer sees, and every array of a test is a heap block of its own size, so that AddressSanitizer sees
// what is read or written beside it. What it cannot show: two blocks that write the same place, what a device rounds
// differently (exp, log and fused products), and whether reads are coalesced. Shuffles take full warps only.
//
// Include it first (the tests compile with -include): block.cuh leaves to it all that only a GPU has.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr int warp_size = 32;

struct Warp {
  explicit Warp(int lanes) : together(lanes) {}
  std::barrier<> together;
  // Two sets of places: who is late in reading one is waited for before it is written again.
  alignas(16) unsigned char place[2][warp_size][16];
};

struct Block {
  Block(int threads, int shared_bytes)
      : together(threads), shared(static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16))) {
    for (int first = 0; first < threads; first += warp_size)
      warps.push_back(std::make_unique<Warp>(threads - first < warp_size ? threads - first : warp_size));
  }
  ~Block() { std::free(shared); }
  std::barrier<> together;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared;
  std::atomic<int> votes[3] = {};  // in turn: while one is held, the next is cleared
};

inline Block* block;  // the one that runs
inline thread_local int exchange;  // which set of places is next
inline thread_local int vote;      // which vote is next

[[noreturn]] inline void fail(const char* why, int status) {
  std::fprintf(stderr, "%s\n", why);
  std::fflush(stderr);
  std::_Exit(status);
}

inline Warp& warp() { return *block->warps[threadIdx.x / warp_size]; }

// The value of the lane that `source(lane)` names, of the own lane where it names none.
template <class T, class F>
T shuffle(unsigned mask, T value, F source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  if (mask != 0xffffffffu) fail("emulation: shuffles take full warps only", 2);
  Warp& w = warp();
  const int lane = threadIdx.x % warp_size, from = source(lane), set = exchange;
  exchange = 1 - exchange;
  std::memcpy(w.place[set][lane], &value, sizeof(T));
  w.together.arrive_and_wait();
  if (from >= 0 && from < warp_size) std::memcpy(&value, w.place[set][from], sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->together.arrive_and_wait(); }

inline int __syncthreads_or(int predicate) {
  const int now = emulation::vote;
  emulation::vote = (now + 1) % 3;
  if (predicate) emulation::block->votes[now] = 1;
  emulation::block->votes[emulation::vote] = 0;  // all have read it: they came to the vote before this one
  emulation::block->together.arrive_and_wait();
  return emulation::block->votes[now];
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) emulation::fail("emulation: __syncwarp takes full warps only", 2);
  emulation::warp().together.arrive_and_wait();
}

inline void __threadfence() {}  // blocks run one after another, and threads of a block meet at barriers

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::shuffle(mask, value, [=](int lane) { return lane / width * width + source % width; });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulation::shuffle(mask, value, [=](int lane) { return lane ^ distance; });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return emulation::shuffle(mask, value, [=](int lane) {
    const int from = lane + static_cast<int>(distance);
    return from / width == lane / width ? from : lane;
  });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return emulation::shuffle(mask, value, [=](int lane) {
    const int from = lane % width - static_cast<int>(distance);
    return from >= 0 ? lane - static_cast<int>(distance) : lane;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = predicate ? 1u << threadIdx.x % emulation::warp_size : 0u;
  for (int distance = 1; distance < emulation::warp_size; distance *= 2)
    votes |= __shfl_xor_sync(mask, votes, distance);
  return votes;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T atomicAdd(T* where, T value) {
  return std::atomic_ref<T>(*where).fetch_add(value, std::memory_order_relaxed);
}

template <class T>
T atomicMax(T* where, T value) {
  std::atomic_ref<T> at(*where);
  T seen = at.load(std::memory_order_relaxed);
  while (seen < value && !at.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}

template <class T>
T atomicCAS(T* where, T expected, T value) {
  std::atomic_ref<T>(*where).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}

namespace counterpoise::cuda {

constexpr int stopped = 70;  // the exit status of a program whose kernel stopped

struct Launch {
  int64_t blocks;
  int threads;
  void* stream;
  int shared = 0;
};

// Fewer blocks than asked for, where a test compiles with this: kernels that take any grid then go round.
#if !defined(EMULATION_MOST_BLOCKS)
#define EMULATION_MOST_BLOCKS 0x7fffffff
#endif

template <class... P, class... A>
void launch(void (*kernel)(P...), const Launch& on, A... arguments) {
  gridDim = {static_cast<unsigned>(on.blocks < EMULATION_MOST_BLOCKS ? on.blocks : EMULATION_MOST_BLOCKS)};
  blockDim = {static_cast<unsigned>(on.threads)};
  for (unsigned b = 0; b < gridDim.x; ++b) {
    emulation::Block block(on.threads, on.shared);
    emulation::block = &block;
    std::vector<std::thread> threads;
    threads.reserve(on.threads);
    for (unsigned t = 0; t < blockDim.x; ++t) {
      threads.emplace_back([&, t] {
        threadIdx = {t};
        blockIdx = {b};
        emulation::exchange = emulation::vote = 0;
        kernel(static_cast<P>(arguments)...);
        // A thread that is through is not waited for.
        emulation::warp().together.arrive_and_drop();
        block.together.arrive_and_drop();
      });
    }
    for (auto& thread : threads) thread.join();
  }
}

inline float float_of_half_bits(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t half_bits_of_float(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

inline unsigned char* emulated_dynamic_shared() { return emulation::block->shared; }

[[noreturn]] inline void stop(const char* why) { emulation::fail(why, stopped); }

}  // namespace counterpoise::cuda

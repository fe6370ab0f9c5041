// The least of many costs: of each query those that are among its `count` least, over tiles that come one by one.
//
// A row of a tile belongs to a block, which keeps the least so far in shared memory, in order. What is less than the
// worst of them gathers behind them; when there is no more room, everything is sorted and the best are kept. Costs tie
// by their number, so that there is one answer, in whatever order threads come. Where queries are few, blocks share a
// row: each finds the least of a part, and a second launch takes what they found as one more tile.
#pragma once

#include "../cpu/selection.h"
#include "block.cuh"

namespace counterpoise::cuda {

constexpr int nearest_threads = 256;
constexpr int nearest_each = 8;                   // costs that a thread looks at between two barriers
constexpr int nearest_most = 2048;                // kept of a query; counterpoise/kernels/selection.py knows it too
constexpr int nearest_held = nearest_most + 768;  // that shared memory has room for, of the widest type
constexpr int64_t nearest_part = 1 << 14;         // columns of a row that a block of its own is worth
constexpr int64_t nearest_blocks = 512;           // wanted on a device
constexpr int64_t nearest_grid = 1 << 16;         // a larger grid goes round

// Costs of a row, or of what is left of it; the numbers count on from the first, or are given.
template <class T>
struct Costs {
  const T* cost;
  const int64_t* numbers;  // null = they count on
  int64_t first, left;

  CP_DEVICE int64_t number(int64_t at) const { return numbers == nullptr ? first + at : numbers[at]; }
  CP_DEVICE Costs behind(int64_t at) const {
    return {cost + at, numbers == nullptr ? nullptr : numbers + at, first + at, left - at};
  }
};

// A tile, (queries, columns); each row in so many parts.
template <class T>
struct NearestTile {
  Costs<T> row;  // the first; `left` is how many columns there are
  int64_t queries;
  int parts;
  int64_t width;  // of a part; the last has what is left over too
  int count;      // to be kept
  int room;       // for what gathers behind them
  bool first;     // nothing has been kept so far

  CP_DEVICE Costs<T> part(int64_t query, int64_t number) const {
    const int64_t skipped = number * width, at = query * row.left + skipped;
    return {row.cost + at, row.numbers == nullptr ? nullptr : row.numbers + at, row.first + skipped,
            number + 1 < parts ? width : row.left - skipped};
  }
};

// What a block keeps, in shared memory: (cost, number), in order up to `count` and without any behind.
template <class T>
struct Kept {
  T* cost;
  int64_t* number;

  CP_DEVICE bool above(int i, T other, int64_t its_number) const {
    return cost[i] > other || (cost[i] == other && number[i] > its_number);
  }

  CP_DEVICE void order(int low, int high) const {
    if (!above(low, cost[high], number[high])) return;
    const T c = cost[low];
    const int64_t n = number[low];
    cost[low] = cost[high];
    number[low] = number[high];
    cost[high] = c;
    number[high] = n;
  }

  // The first n, ascending: bitonic, and every exchange puts the greater behind, so that n need be no power of two.
  CP_DEVICE void sort(int n) const {
    for (int half = 1; half < n; half *= 2) {
      for (int apart = half; apart > 0; apart /= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; 2 * pair - (pair & (apart - 1)) < n; pair += blockDim.x) {
          const int low = 2 * pair - (pair & (apart - 1));
          const int high = apart == half ? low ^ (2 * half - 1) : low + apart;
          if (high < n) order(low, high);
        }
      }
    }
    __syncthreads();
  }
};

// The last of the kept.
template <class T>
struct Worst {
  T cost;
  int64_t number;
};

// Where a thread looks, N neighbours at a time, at what a block sees between two barriers.
template <int N>
CP_DEVICE int looks_at(int k) {
  return (k / N * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N + k % N;
}

// Which of these may belong to the least, a bit for each; NaN never does.
template <int N, class T>
CP_DEVICE unsigned promising(const Costs<T>& costs, T worst) {
  T cost[nearest_each];
#pragma unroll
  for (int k = 0; k < nearest_each; k += N) {
    T pack[N] = {};
    if (looks_at<N>(k) < costs.left) load_pack(costs.cost + looks_at<N>(k), pack);
#pragma unroll
    for (int i = 0; i < N; ++i) cost[k + i] = pack[i];
  }
  unsigned found = 0;
#pragma unroll
  for (int k = 0; k < nearest_each; ++k) found |= cost[k] <= worst && looks_at<N>(k) < costs.left ? 1u << k : 0u;
  return found;
}

// Puts what is less than the worst behind the kept, and sorts whenever the room is full; `filled` is shared. So few
// costs come here that they are read again.
template <int N, class T>
CP_DEVICE void gather(const NearestTile<T>& p, const Kept<T>& kept, int& filled, const Costs<T>& costs,
                      Worst<T>& worst) {
  unsigned pending = promising<N>(costs, worst.cost);
  for (;;) {
#pragma unroll 1
    for (int k = 0; pending >> k != 0; ++k) {
      if (!(pending >> k & 1)) continue;
      const T x = costs.cost[looks_at<N>(k)];
      const int64_t number = costs.number(looks_at<N>(k));
      if (x < worst.cost || (x == worst.cost && number < worst.number)) {
        const int at = atomicAdd(&filled, 1);
        if (at >= p.room) break;
        kept.cost[p.count + at] = x;
        kept.number[p.count + at] = number;
      }
      pending &= ~(1u << k);
    }
    if (!__syncthreads_or(pending != 0)) return;
    kept.sort(p.count + p.room);
    if (threadIdx.x == 0) filled = 0;
    worst = {kept.cost[p.count - 1], kept.number[p.count - 1]};
    __syncthreads();
  }
}

// What is kept before a row is looked at: what earlier tiles left, or the first costs. How many these were.
template <class T>
CP_DEVICE int begin_kept(const NearestTile<T>& p, const Kept<T>& kept, const Costs<T>& costs, const T* near,
                         const int64_t* keys) {
  if (!p.first) {
    for (int i = threadIdx.x; i < p.count; i += blockDim.x) {
      kept.cost[i] = near[i];
      kept.number[i] = keys[i];
    }
    __syncthreads();
    return 0;
  }
  const int held = costs.left < p.count + p.room ? static_cast<int>(costs.left) : p.count + p.room;
  for (int i = threadIdx.x; i < held; i += blockDim.x) {
    const T x = costs.cost[i];
    kept.cost[i] = x == x ? x : math::infinity<T>;
    kept.number[i] = costs.number(i);
  }
  kept.sort(held);
  return held;
}

// near and keys: (queries, parts, count), each in order.
template <class T, int N>
__global__ void __launch_bounds__(nearest_threads) selection_nearest_kernel(NearestTile<T> p, T* near, int64_t* keys) {
  __shared__ int filled;
  CP_DYNAMIC_SHARED(int64_t, numbers);
  const Kept<T> kept{reinterpret_cast<T*>(numbers + p.count + p.room), numbers};
  for (int64_t job = blockIdx.x; job < p.queries * p.parts; job += gridDim.x) {
    const int64_t query = p.parts == 1 ? job : static_cast<int>(job) / p.parts;  // parts are of few queries
    T* its_near = near + job * p.count;
    int64_t* its_keys = keys + job * p.count;
    Costs<T> costs = p.part(query, job - query * p.parts);
    if (threadIdx.x == 0) filled = 0;
    costs = costs.behind(begin_kept(p, kept, costs, its_near, its_keys));
    Worst<T> worst{kept.cost[p.count - 1], kept.number[p.count - 1]};
    for (; costs.left > 0; costs = costs.behind(static_cast<int64_t>(blockDim.x) * nearest_each))
      gather<N>(p, kept, filled, costs, worst);
    if (filled > 0) kept.sort(p.count + (filled < p.room ? filled : p.room));
    for (int i = threadIdx.x; i < p.count; i += blockDim.x) {
      its_near[i] = kept.cost[i];
      its_keys[i] = kept.number[i];
    }
    __syncthreads();
  }
}

// Into how many parts rows are cut where there are few, so that blocks enough find work.
inline int64_t nearest_parts(int64_t queries, int64_t columns, int64_t count) {
  const int64_t least = 4 * count > nearest_part ? 4 * count : nearest_part;
  const int64_t wanted = queries > 0 ? nearest_blocks / queries : 1, most = columns / least;
  const int64_t parts = wanted < most ? wanted : most;
  return parts > 1 ? parts : 1;
}

// Takes a tile into near and keys (queries, parts, count).
template <class T>
void selection_nearest_part_on(NearestTile<T> p, void* near, int64_t* keys, int threads, void* stream) {
  const int wanted = p.count < 512 ? 512 : p.count, most = nearest_held - p.count;
  p.room = (p.count + (wanted < most ? wanted : most)) / 4 * 4 - p.count;  // packs begin behind the first that are held
  constexpr int width = pack_width<T>;
  const bool packs = takes_packs<T, width>(p.row.cost, p.row.left);
  const int64_t jobs = p.queries * p.parts;
  const int shared = (p.count + p.room) * static_cast<int>(sizeof(T) + sizeof(int64_t));
  launch(packs ? selection_nearest_kernel<T, width> : selection_nearest_kernel<T, 1>,
         {jobs < nearest_grid ? jobs : nearest_grid, threads, stream, shared}, p, static_cast<T*>(near), keys);
}

// Takes a tile into near and keys (queries, count). With more than one part `near_of_parts` and `keys_of_parts` have
// room for (queries, parts, count).
template <class T>
void selection_nearest_on(const CostRows& rows, int64_t queries, int64_t parts, void* near_of_parts,
                          int64_t* keys_of_parts, void* near, int64_t* keys, void* stream,
                          int threads = nearest_threads) {
  if (queries == 0 || rows.count == 0) return;
  const int count = static_cast<int>(rows.count);
  Costs<T> row{static_cast<const T*>(rows.costs), nullptr, rows.start, rows.columns};
  if (parts > 1) {
    const int64_t width = rows.columns / parts / 4 * 4;  // so that packs may begin where a part does
    selection_nearest_part_on(NearestTile<T>{row, queries, static_cast<int>(parts), width, count, 0, true},
                              near_of_parts, keys_of_parts, threads, stream);
    row = {static_cast<const T*>(near_of_parts), keys_of_parts, 0, parts * rows.count};
  }
  selection_nearest_part_on(NearestTile<T>{row, queries, 1, row.left, count, 0, rows.first}, near, keys, threads,
                            stream);
}

}  // namespace counterpoise::cuda

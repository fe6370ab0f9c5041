// Selection: the same distance to the last bit wherever two points are compared, so that copies of a point tie; sums
// over a tile of costs in one pass, roots included; the least of many costs in one pass, by a heap.
#include "../selection.h"

#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

CP_INLINE double distance(const double* x, const double* y, int64_t width) {
  constexpr int lanes = 32;
  double part[lanes] = {};
  int64_t j = 0;
  for (; j + lanes <= width; j += lanes)
    for (int k = 0; k < lanes; ++k) {
      const double apart = x[j + k] - y[j + k];
      part[k] += apart * apart;
    }
  double rest = 0;
  for (; j < width; ++j) rest += (x[j] - y[j]) * (x[j] - y[j]);
  for (int k = lanes / 2; k > 0; k /= 2)
    for (int i = 0; i < k; ++i) part[i] += part[i + k];
  return __builtin_sqrt(rest + part[0]);
}

void distances(const double* x, const int64_t* rows, const double* centres, const int64_t* which, int64_t n,
               int64_t width, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = distance(x + rows[i] * width, centres + which[i] * width, width);
}

int64_t follow(const Leaders& p, int64_t most, int64_t* picks, double* gaps) {
  int64_t count = 0;
  for (; count < most; ++count) {
    int64_t best = 0;
    for (int64_t i = 1; i < p.count; ++i) best = p.distance[i] > p.distance[best] ? i : best;
    const double gap = p.distance[best];
    if (gap < p.bound || (gap == p.bound && p.index[best] > p.bound_index) || gap == 0) break;
    picks[count] = p.index[best];
    gaps[count] = gap;
    const double* centre = p.points + best * p.width;
    for (int64_t i = 0; i < p.count; ++i) {
      if (p.distance[i] < p.bound) continue;  // not the farthest of all any more
      const double apart = distance(p.points + i * p.width, centre, p.width);
      p.distance[i] = apart < p.distance[i] ? apart : p.distance[i];
    }
    p.distance[best] = 0;
  }
  return count;
}

template <bool Root>
CP_INLINE double cost(double x, double rounding) {
  if constexpr (!Root) return x;
  return __builtin_sqrt(x > rounding ? x : 0.0);
}

// Costs of at least `high` take nothing, and need no root: among many picks nearly all. Sixteen are looked at together.
template <bool Root>
void taken_of(const CostTile& p, const double* before, const double* after, double* out) {
  const double rounding = p.rounding;
  for (int64_t i = 0; i < p.rows; ++i) {
    const double* __restrict x = p.squares + i * p.columns;
    double* __restrict total = out;
    const double high = before[i], low = after == nullptr ? -math::infinity<double> : after[i];
    const double square = high * high * (1 + 1e-15), limit = !Root ? high : (square > rounding ? square : rounding);
    const auto take = [&](int64_t j) {
      const double c = cost<Root>(x[j], rounding), from = c < low ? low : c;
      total[j] += high - (from > high ? high : from);
    };
    int64_t j = 0;
    for (; j + lanes <= p.columns; j += lanes) {
      int64_t some = 0;
#pragma omp simd reduction(| : some)
      for (int64_t k = 0; k < lanes; ++k) some |= x[j + k] <= limit;
      if (some == 0) continue;
#pragma omp simd
      for (int64_t k = 0; k < lanes; ++k) take(j + k);
    }
    for (; j < p.columns; ++j) take(j);
  }
}

void taken(const CostTile& p, const double* before, const double* after, double* out) {
  p.rounding >= 0 ? taken_of<true>(p, before, after, out) : taken_of<false>(p, before, after, out);
}

template <class T>
struct Heap {
  T* cost;
  int64_t* key;
  int64_t count;

  CP_INLINE bool worse(int64_t i, T other, int64_t number) const {
    return cost[i] > other || (cost[i] == other && key[i] > number);
  }

  // Puts an entry at position i, and what is worse than it above.
  CP_INLINE void sink(int64_t i, T c, int64_t number) {
    for (int64_t child = 2 * i + 1; child < count; child = 2 * i + 1) {
      if (child + 1 < count && worse(child + 1, cost[child], key[child])) ++child;
      if (!worse(child, c, number)) break;
      cost[i] = cost[child];
      key[i] = key[child];
      i = child;
    }
    cost[i] = c;
    key[i] = number;
  }
};

// Keys come in order, so that one that ties with the worst is no better. NaN is not less than anything.
template <class T>
void scan(const T* __restrict x, int64_t from, int64_t to, int64_t start, Heap<T>& heap) {
  constexpr int64_t together = 4 * lanes;
  const auto look = [&](int64_t j) {
    if (x[j] < heap.cost[0]) heap.sink(0, x[j], start + j);
  };
  int64_t j = from;
  for (; j + together <= to; j += together) {
    const T worst = heap.cost[0];
    int some = 0;
#pragma omp simd reduction(| : some)
    for (int64_t k = 0; k < together; ++k) some |= x[j + k] < worst;
    if (some == 0) continue;
    for (int64_t k = 0; k < together; ++k) look(j + k);
  }
  for (; j < to; ++j) look(j);
}

template <class T>
void nearest_of(const CostRows& p, int64_t begin, int64_t end, void* near, int64_t* keys) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.costs) + i * p.columns;
    Heap<T> heap{static_cast<T*>(near) + i * p.count, keys + i * p.count, p.count};
    if (p.first) {
      for (int64_t j = 0; j < p.count; ++j) {
        heap.cost[j] = x[j] == x[j] ? x[j] : math::infinity<T>;
        heap.key[j] = p.start + j;
      }
      for (int64_t j = p.count / 2 - 1; j >= 0; --j) heap.sink(j, heap.cost[j], heap.key[j]);
    }
    scan(x, p.first ? p.count : 0, p.columns, p.start, heap);
  }
}

void nearest(const CostRows& p, int64_t begin, int64_t end, void* near, int64_t* keys) {
  p.type == Type::float64 ? nearest_of<double>(p, begin, end, near, keys)
                          : nearest_of<float>(p, begin, end, near, keys);
}

}  // namespace

const SelectionTable selection_table = {distances, follow, taken, nearest};

}  // namespace counterpoise::CP_ARCH

// Selection: the same distance to the last bit wherever two points are compared, so that copies of a point tie; sums over
// a tile of costs in one pass, roots included.
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

}  // namespace

const SelectionTable selection_table = {distances, follow, taken};

}  // namespace counterpoise::CP_ARCH

// Selection: the same distance to the last bit wherever two points are compared, so that copies of a point tie.
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

}  // namespace

const SelectionTable selection_table = {distances, follow};

}  // namespace counterpoise::CP_ARCH

// Gains of selection: what falling costs take from the columns of a tile, in double precision.
//
// A column belongs to a lane. Each warp of a block sums 64 rows of it, and the first warp adds these sums in order: the
// additions are the host's, one for one, whatever the launch, and no memory is wanted beside the tile and the result.
#pragma once

#include "../cpu/selection.h"
#include "block.cuh"

namespace counterpoise::cuda {

constexpr int taken_rows = 64;   // that are summed together
constexpr int taken_warps = 16;  // of a block, at most

// What is computed of a row once. Costs whose squares (or that themselves) are above `limit` take nothing.
struct TakenRow {
  double high, low, limit;
};

struct TakenTile {
  const double *squares, *before, *after;  // after null = -infinity
  int64_t rows, columns;
  double rounding;  // below 0: the tile holds costs

  CP_DEVICE TakenRow row(int64_t i) const {
    const double high = before[i], low = after == nullptr ? -math::infinity<double> : after[i];
    const double square = high * high * (1 + 1e-15);  // no root of more is below `high`
    return {high, low, rounding < 0 ? high : (square > rounding ? square : rounding)};
  }
};

template <bool Root>
CP_DEVICE double taken_by(const TakenRow& row, double x, double rounding) {
  if (!(x <= row.limit)) return 0;  // among many picks nearly all: a root takes long
  const double cost = !Root ? x : (x > rounding ? ::sqrt(x) : 0.0), from = cost < row.low ? row.low : cost;
  return row.high - (from > row.high ? row.high : from);
}

// The sum over rows [begin, end) of one column; `rows` has been filled by the warp's lanes.
template <bool Root>
CP_DEVICE double taken_from(const TakenTile& p, const TakenRow* rows, int64_t begin, int count, int64_t column) {
  double total = 0;
  const double* x = p.squares + begin * p.columns + column;
#pragma unroll 8  // so that several loads are under way before the first is used
  for (int i = 0; i < count; ++i) total += taken_by<Root>(rows[i], x[i * p.columns], p.rounding);
  return total;
}

template <bool Root>
__global__ void __launch_bounds__(taken_warps* warp_size) selection_taken_kernel(TakenTile p, double* out) {
  __shared__ TakenRow rows[taken_warps][taken_rows];
  __shared__ double sums[taken_warps][warp_size];
  const int64_t blocks = (p.rows + taken_rows - 1) / taken_rows, strips = (p.columns + warp_size - 1) / warp_size;
  for (int64_t strip = blockIdx.x; strip < strips; strip += gridDim.x) {
    const int64_t column = strip * warp_size + lane();
    const bool there = column < p.columns;
    double total = warp() == 0 && there ? out[column] : 0;
    for (int64_t first = 0; first < blocks; first += warps()) {
      const int64_t begin = (first + warp()) * taken_rows, left = p.rows - begin;
      const int count = left < taken_rows ? (left > 0 ? static_cast<int>(left) : 0) : taken_rows;
      for (int i = lane(); i < count; i += warp_size) rows[warp()][i] = p.row(begin + i);
      __syncwarp();
      sums[warp()][lane()] = there ? taken_from<Root>(p, rows[warp()], begin, count, column) : 0;
      __syncthreads();
      for (int w = 0; warp() == 0 && w < warps() && first + w < blocks; ++w) total += sums[w][lane()];
      __syncthreads();
    }
    if (warp() == 0 && there) out[column] = total;
  }
}

// Adds to out (columns).
inline void selection_taken_on(const TakenTile& p, double* out, void* stream) {
  const int64_t blocks = (p.rows + taken_rows - 1) / taken_rows, strips = (p.columns + warp_size - 1) / warp_size;
  if (blocks == 0 || strips == 0) return;
  const int warps = blocks < taken_warps ? static_cast<int>(blocks) : taken_warps;
  launch(p.rounding >= 0 ? selection_taken_kernel<true> : selection_taken_kernel<false>,
         {strips < (1 << 16) ? strips : (1 << 16), warps * warp_size, stream}, p, out);
}

}  // namespace counterpoise::cuda

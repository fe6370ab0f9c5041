// Selection: exact distances of pairs in double precision, a warp to a pair.
//
// Lanes go down the coordinates side by side and are added in one order, whatever the pair and the launch: copies of a
// point are at the same distance to the last bit.
#pragma once

#include "../cpu/selection.h"
#include "block.cuh"

namespace counterpoise::cuda {

constexpr int selection_threads = 256;
constexpr int64_t selection_most_blocks = 1 << 16;  // a larger grid goes round

// out_i = |x_rows(i) - centre_which(i)|.
struct SelectionPairs {
  const double* x;
  const int64_t* rows;
  const double* centres;
  const int64_t* which;
  int64_t count, width;
};

__global__ void __launch_bounds__(selection_threads) selection_distances_kernel(SelectionPairs p, double* out) {
  const int64_t teams = static_cast<int64_t>(gridDim.x) * warps();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warps() + warp(); i < p.count; i += teams) {
    const double *x = p.x + p.rows[i] * p.width, *y = p.centres + p.which[i] * p.width;
    double sum = 0;
    for (int64_t j = lane(); j < p.width; j += warp_size) sum += (x[j] - y[j]) * (x[j] - y[j]);
    sum = warp_reduce(sum, Add());
    if (lane() == 0) out[i] = ::sqrt(sum);
  }
}

inline void selection_distances_on(const SelectionPairs& p, double* out, void* stream) {
  constexpr int64_t teams = selection_threads / warp_size;
  const int64_t blocks = (p.count + teams - 1) / teams;
  if (blocks == 0) return;
  launch(selection_distances_kernel,
         {blocks < selection_most_blocks ? blocks : selection_most_blocks, selection_threads, stream}, p, out);
}

}  // namespace counterpoise::cuda

// Points of selection: exact distances of pairs in double precision, a warp to a pair, and farthest-first picks among
// leaders, which one block follows pick by pick.
//
// Lanes go down the coordinates side by side and are added in one order, whatever the pair, the kernel and the launch:
// copies of a point are at the same distance to the last bit.
#pragma once

#include "../cpu/selection.h"
#include "block.cuh"

namespace counterpoise::cuda {

constexpr int selection_threads = 256;
constexpr int64_t selection_most_blocks = 1 << 16;  // a larger grid goes round
constexpr int follow_threads = 1024;                // one block is all that follows picks
constexpr int follow_together = 4;                  // leaders whose distances a warp finds together

// out_i = |x_rows(i) - centre_which(i)|.
struct SelectionPairs {
  const double* x;
  const int64_t* rows;
  const double* centres;
  const int64_t* which;
  int64_t count, width;
};

// Of several points to y, for every lane of a warp: their loads and sums are under way together. The fused product is
// written out, so that no compiler rounds it in one kernel alone.
template <int N>
CP_DEVICE void selection_distances_to(const double* y, const double* const (&x)[N], int64_t width, double (&found)[N]) {
  double sum[N] = {};
#pragma unroll(4 / N)  // so that several loads are under way before the first is used
  for (int64_t j = lane(); j < width; j += warp_size) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double apart = x[k][j] - y[j];
      sum[k] = ::fma(apart, apart, sum[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) found[k] = ::sqrt(warp_reduce(sum[k], Add()));
}

__global__ void __launch_bounds__(selection_threads) selection_distances_kernel(SelectionPairs p, double* out) {
  const int64_t teams = static_cast<int64_t>(gridDim.x) * warps();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warps() + warp(); i < p.count; i += teams) {
    const double* const x[1] = {p.x + p.rows[i] * p.width};
    double found[1];
    selection_distances_to(p.centres + p.which[i] * p.width, x, p.width, found);
    if (lane() == 0) out[i] = found[0];
  }
}

inline void selection_distances_on(const SelectionPairs& p, double* out, void* stream) {
  constexpr int64_t teams = selection_threads / warp_size;
  const int64_t blocks = (p.count + teams - 1) / teams;
  if (blocks == 0) return;
  launch(selection_distances_kernel,
         {blocks < selection_most_blocks ? blocks : selection_most_blocks, selection_threads, stream}, p, out);
}

// ---- picks among leaders ----------------------------------------------------------------------------------------

// The farthest leader so far; at is its position, -1 for none.
struct Farthest {
  double distance;
  int64_t at;
};

CP_DEVICE Farthest across(Farthest x, int distance) { return {across(x.distance, distance), across(x.at, distance)}; }

// Of equals the lowest position.
struct Farther {
  template <class T>
  static CP_DEVICE T none() {
    return T{-math::infinity<double>, -1};
  }
  CP_DEVICE Farthest operator()(Farthest a, Farthest b) const {
    if (a.at < 0 || b.at < 0) return a.at < 0 ? b : a;
    if (a.distance != a.distance || b.distance != b.distance) return a.at < b.at ? a : b;  // all lanes have to agree
    return a.distance > b.distance || (a.distance == b.distance && a.at < b.at) ? a : b;
  }
};

// Shows a warp's leaders the pick (-1 = none yet); the farthest that each lane has of them. A lane looks after every
// leader whose distance it reads; those that are below the bound cost no more than that.
CP_DEVICE Farthest show_leaders(const Leaders& p, int64_t pick) {
  Farthest mine = Farther::none<Farthest>();
  for (int64_t first = warp(); first < p.count; first += blockDim.x) {
    const int64_t i = first + static_cast<int64_t>(lane()) * warps();
    const bool there = i < p.count;
    double distance = there ? p.distance[i] : 0;
    unsigned left = __ballot_sync(all_lanes, there && pick >= 0 && i != pick && !(distance < p.bound));
    while (left != 0) {
      int source[follow_together];
      const double* x[follow_together];
      double apart[follow_together];
#pragma unroll
      for (int k = 0; k < follow_together; ++k) {
        source[k] = left != 0 ? __ffs(left) - 1 : source[0];  // the first again where no more are left
        left &= left - 1;
        x[k] = p.points + (first + static_cast<int64_t>(source[k]) * warps()) * p.width;
      }
      selection_distances_to(p.points + pick * p.width, x, p.width, apart);
#pragma unroll
      for (int k = 0; k < follow_together; ++k)
        if (source[k] == lane() && apart[k] < distance) distance = apart[k];
    }
    if (!there) continue;
    if (i == pick) distance = 0;
    if (pick >= 0) p.distance[i] = distance;
    mine = Farther()(mine, {distance, i});
  }
  return mine;
}

// Picks until another point than a leader may be the farthest, all distances are 0, or there are `most`; how many.
__global__ void __launch_bounds__(follow_threads)
    selection_follow_kernel(Leaders p, int64_t most, int64_t* picks, double* gaps, int64_t* count) {
  __shared__ Farthest scratch[warp_size];
  int64_t found = 0;
  for (int64_t pick = -1; found < most; ++found) {
    const Farthest best = block_reduce(show_leaders(p, pick), Farther(), scratch);
    const double gap = best.distance;
    if (gap < p.bound || (gap == p.bound && p.index[best.at] > p.bound_index) || gap == 0) break;
    pick = best.at;
    if (threadIdx.x == 0) {
      picks[found] = p.index[pick];
      gaps[found] = gap;
    }
    if (found + 1 == most) show_leaders(p, pick);  // whoever goes on finds all distances up to date
  }
  if (threadIdx.x == 0) *count = found;
}

inline void selection_follow_on(const Leaders& p, int64_t most, int64_t* picks, double* gaps, int64_t* count,
                                void* stream, int threads = follow_threads) {
  launch(selection_follow_kernel, {1, threads, stream}, p, most, picks, gaps, count);
}

}  // namespace counterpoise::cuda

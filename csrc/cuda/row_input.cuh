// Row-wise family: what the kernels are given, which threads share a row, and how a thread reads and writes its classes.
#pragma once

#include "../cpu/rows.h"
#include "../math/rows.h"
#include "block.cuh"

namespace counterpoise::cuda {

constexpr int row_threads = 256;
constexpr int row_resident = 2;                // blocks on a multiprocessor, at least: what registers are shared out for
constexpr int64_t row_of_warp = 1024;          // classes up to which a row is a warp's, or less
constexpr int row_slice = 1 << 13;             // classes of a row that one group writes the gradient of
constexpr int64_t row_most_classes = 1 << 30;  // they are counted in 32 bits, a block's stride beyond the last
constexpr int64_t row_most_blocks = 1 << 16;
constexpr int64_t row_partials = 1024;         // blocks that share a sum over rows, at most

template <class S>
struct RowInput {
  using T = computed_t<S>;
  const S* logits;
  const int64_t* target;
  const uint8_t* mask;
  const T *additive, *multiplicative, *margin, *class_weight;
  int64_t rows, ignore_index;
  int classes;
  T scale;
  bool packs;  // whether every row, and what goes with its classes, may be read and written in packs
  int lanes;   // threads that share a row: a power of two in a warp, or the block
  math::RowParameters<T> c;

  CP_DEVICE bool counts(int64_t row) const { return target[row] != ignore_index && (mask == nullptr || mask[row] != 0); }
  CP_DEVICE bool has_off() const { return c.kind == math::RowKind::asymmetric && c.smoothing != 0; }
  CP_DEVICE T factor(int64_t j) const { return multiplicative == nullptr ? T(1) : multiplicative[j]; }
  CP_DEVICE T weight(int64_t j) const { return class_weight == nullptr ? T(1) : class_weight[j]; }
  CP_DEVICE T adjusted(T z, int64_t j) const {
    return multiply(multiply_add(z, factor(j), additive == nullptr ? T(0) : additive[j]), scale);
  }
  CP_DEVICE T at_target(int64_t row) const {
    const int64_t y = target[row];
    if (y < 0 || y >= classes) stop("target holds a class index outside [0, C - 1]");
    const T u = adjusted(widen(logits[row * classes + y]), y);
    return margin == nullptr ? u : u - margin[y] * scale;
  }
};

template <class S>
constexpr int row_width = pack_width<S> < 4 ? pack_width<S> : 4;

// A thread's place among those that share a row. Rows [base, base + groups of the block) are taken together, so that
// all threads of a warp meet where they exchange.
struct RowGroup {
  int64_t base, stride;
  int index, rank, lanes;

  explicit CP_DEVICE RowGroup(int lanes)
      : base(static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes)),
        stride(static_cast<int64_t>(gridDim.x) * (blockDim.x / lanes)), index(threadIdx.x / lanes),
        rank(threadIdx.x % lanes), lanes(lanes) {}

  template <class Combine, class R>
  CP_DEVICE R reduce(R x, Combine combine, R* scratch) const {
    return lanes <= warp_size ? warp_reduce(x, combine, lanes) : block_reduce(x, combine, scratch);
  }
};

// ---- neighbours that a thread takes together: classes j, j + step, ... below `to` ------------------------------------

// With Packs they are side by side, and 16 bytes or so are read at once; else the threads of a row read side by side.
template <bool Packs, class X, class T, int N>
CP_DEVICE void read_classes(const X* from, int j, int step, int to, T beyond, T (&x)[N]) {
  if constexpr (Packs) {
    load_pack(from + j, x);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = j + k * step < to ? static_cast<T>(widen(from[j + k * step])) : beyond;
  }
}

template <bool Packs, class X, class T, int N>
CP_DEVICE void write_classes(const T (&x)[N], X* out, int j, int step, int to) {
  if constexpr (Packs) {
    store_pack(x, out + j);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (j + k * step < to) out[j + k * step] = Narrow<X>::from(x[k]);
  }
}

// Puts `value` at class y, where it is among them.
template <bool Packs, class T, int N>
CP_DEVICE void put_at(int y, T value, int j, int step, T (&x)[N]) {
  if (Packs && (y < j || y >= j + N)) return;
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = j + k * step == y ? value : x[k];
}

// u * multiplicative + additive, of an input of either member of the family.
template <bool Packs, class Input, class T, int N>
CP_DEVICE void shift(const Input& p, int j, int step, int to, T (&u)[N]) {
  if (p.additive == nullptr && p.multiplicative == nullptr) return;
  T factor[N], more[N];
#pragma unroll
  for (int k = 0; k < N; ++k) factor[k] = 1, more[k] = 0;
  if (p.multiplicative != nullptr) read_classes<Packs>(p.multiplicative, j, step, to, T(1), factor);
  if (p.additive != nullptr) read_classes<Packs>(p.additive, j, step, to, T(0), more);
#pragma unroll
  for (int k = 0; k < N; ++k) u[k] = multiply_add(u[k], factor[k], more[k]);
}

template <class T, int N>
CP_DEVICE void stretch(T scale, T (&u)[N]) {
  if (scale == 1) return;
#pragma unroll
  for (int k = 0; k < N; ++k) u[k] = multiply(u[k], scale);
}

// visit(adjusted logits, first class, distance) for all that this thread has of classes [from, to); the target and what
// lies beyond are given as -infinity, as a masked class would be.
template <bool Packs, class S, class F>
CP_DEVICE void for_classes(const RowInput<S>& p, const RowGroup& who, int64_t row, int from, int to, F&& visit) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  const S* z = p.logits + row * p.classes;
  const int y = static_cast<int>(p.target[row]), step = Packs ? 1 : who.lanes;
#pragma unroll 4  // so that several loads are under way before the first is used
  for (int j = from + who.rank * (Packs ? width : 1); j < to; j += who.lanes * width) {
    T u[width];
    read_classes<Packs>(z, j, step, to, -math::infinity<T>, u);
    shift<Packs>(p, j, step, to, u);
    stretch(p.scale, u);
    put_at<Packs>(y, -math::infinity<T>, j, step, u);
    visit(u, j, step);
  }
}

}  // namespace counterpoise::cuda

// Row-wise family, a total with its gradient: a row stays in shared memory between the passes over it, so that device
// memory is read once and written once. What the mean divides by does not depend on logits and is found before.
#pragma once

#include "rows.cuh"

namespace counterpoise::cuda {

// Exponentials of doubles leave no registers for larger blocks.
template <class S>
constexpr int kept_threads = sizeof(computed_t<S>) == 8 ? row_threads : 1024;
template <class S>
constexpr int kept_resident = sizeof(computed_t<S>) == 8 ? row_resident : 1;

// Calls visit(what is kept, first class, distance) for all that this thread has kept of a row.
template <bool Packs, class S, class F>
CP_DEVICE void for_kept(const RowInput<S>& p, const RowGroup& who, const computed_t<S>* kept, F&& visit) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  const int step = Packs ? 1 : who.lanes;
#pragma unroll 2
  for (int j = who.rank * (Packs ? width : 1); j < p.classes; j += who.lanes * width) {
    T x[width];
    read_classes<Packs>(kept, j, step, p.classes, -math::infinity<T>, x);
    visit(x, j, step);
  }
}

// Keeps a row's adjusted logits; the largest of the other classes.
template <bool Packs, class S>
CP_DEVICE computed_t<S> keep_row(const RowInput<S>& p, const RowGroup& who, int64_t row, computed_t<S>* kept) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  T top = -math::infinity<T>;
  for_classes<Packs>(p, who, row, 0, p.classes, [&](const T(&u)[width], int j, int step) {
#pragma unroll
    for (int k = 0; k < width; ++k) top = u[k] > top ? u[k] : top;
    write_classes<Packs>(u, kept, j, step, p.classes);
  });
  return top;
}

// The sums over what is kept, which becomes exponentials where logits are not asked for again.
template <bool Packs, class S>
CP_DEVICE RowShare<computed_t<S>> kept_share(const RowInput<S>& p, const RowGroup& who, computed_t<S>* kept,
                                             computed_t<S> top, bool weigh_gap) {
  using T = computed_t<S>;
  RowShare<T> mine{top, 0, 0, 0, 0};
  const bool again = p.c.smoothing != 0;
  for_kept<Packs>(p, who, kept, [&](T(&u)[row_width<S>], int j, int step) {
    if (again) add_smoothed(p, u, top, j, step, weigh_gap, mine);
    mine.sum += exponentials(u, top);
    if (!again) write_classes<Packs>(u, kept, j, step, p.classes);
  });
  return mine;
}

template <bool Packs, class S>
CP_DEVICE Two<computed_t<S>> kept_off(const RowInput<S>& p, const RowGroup& who, const computed_t<S>* kept,
                                      computed_t<S> shift) {
  using T = computed_t<S>;
  Two<T> mine{0, 0};
  for_kept<Packs>(p, who, kept, [&](const T(&u)[row_width<S>], int, int) { add_off(p, u, shift, mine); });
  return mine;
}

// The gradient of a row from what is kept; zeros where it does not count.
template <bool Packs, class S>
CP_DEVICE void write_kept(const RowInput<S>& p, const RowGroup& who, int64_t row, bool counts, const computed_t<S>* kept,
                          const math::RowSlopes<computed_t<S>>& s, S* grad) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  const int y = static_cast<int>(p.target[row]), step = Packs ? 1 : who.lanes;
#pragma unroll 2
  for (int j = who.rank * (Packs ? width : 1); j < p.classes; j += who.lanes * width) {
    T g[width] = {};
    if (counts) {
      T u[width];
      read_classes<Packs>(kept, j, step, p.classes, -math::infinity<T>, u);
#pragma unroll
      for (int k = 0; k < width; ++k) g[k] = u[k];
      if (p.c.smoothing != 0) exponentials(g, s.top);
      slopes_of<Packs>(p, s, y, u, j, step, p.classes, g);
    }
    write_classes<Packs>(g, grad + row * p.classes, j, step, p.classes);
  }
}

template <class S, bool Packs>
__global__ void __launch_bounds__(kept_threads<S>, kept_resident<S>)
    kept_rows(RowInput<S> p, RowTotal<computed_t<S>> out, S* grad) {
  using T = computed_t<S>;
  CP_DYNAMIC_SHARED(T, shared);
  __shared__ T top_scratch[warp_size];
  __shared__ RowShare<T> share_scratch[warp_size];
  __shared__ Two<T> off_scratch[warp_size];
  const RowGroup who(p.lanes);
  const MergeRows merge{p.c.kind == math::RowKind::cross_entropy};
  T* const kept = shared + who.index * p.classes;
  const double divisor = out.kind == RowDivisor::number ? out.number : *out.divisor;
  for (int64_t base = who.base; base < p.rows; base += who.stride) {
    const int64_t row = base + who.index;
    const bool counts = row < p.rows && p.counts(row);
    const T others = who.reduce(counts ? keep_row<Packs>(p, who, row, kept) : -math::infinity<T>, Larger(), top_scratch);
    const T target = counts ? p.at_target(row) : T(0), top = target > others ? target : others;
    RowShare<T> all = MergeRows::none<RowShare<T>>();
    if (counts) all = kept_share<Packs>(p, who, kept, top, merge.weigh_gap);
    all = who.reduce(all, merge, share_scratch);
    math::RowSums<T> s = sums_of(p, row, counts, target, top, all);
    if (p.has_off()) {
      Two<T> off{0, 0};
      if (counts) off = kept_off<Packs>(p, who, kept, top + math::row_terms(s, p.c.smoothing).log_total);
      off = who.reduce(off, Add(), off_scratch);
      s.off_value = off.first;
      s.off_slope = off.second;
    }
    if (row >= p.rows) continue;
    const math::RowSlopes<T> slopes = counts ? math::row_slopes(s, p.c) : math::RowSlopes<T>{};
    if (who.rank == 0) out.losses[row] = slopes.loss;
    const double weight = out.weight == nullptr ? 1.0 : static_cast<double>(out.weight[row]);
    write_kept<Packs>(p, who, row, counts, kept, scaled(slopes, static_cast<T>(weight / divisor) * p.scale), grad);
  }
}

// grad *= *by, and nothing at all where that is one.
template <class S>
__global__ void __launch_bounds__(row_threads) scale_gradient(S* grad, int64_t n, const computed_t<S>* by) {
  const computed_t<S> factor = *by;
  if (factor == 1) return;
  for (int64_t i = grid_first(); i < n; i += grid_stride()) grad[i] = Narrow<S>::from(widen(grad[i]) * factor);
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Threads that share a row. Blocks are small where a multiprocessor has room for several rows, so that one reads while
// another computes.
template <class S>
int kept_lanes(int64_t classes, int most = kept_threads<S>) {
  const int64_t bytes = classes * static_cast<int64_t>(sizeof(computed_t<S>));
  const int lanes = bytes <= 56 << 10 ? row_lanes<S>(classes) : (bytes <= 112 << 10 ? 512 : 1024);
  return lanes < most ? lanes : most;
}

// Bytes of shared memory that a block needs for its rows.
template <class S>
int64_t kept_bytes(int64_t classes, int most = kept_threads<S>) {
  const int lanes = kept_lanes<S>(classes, most);
  return row_block(lanes) / lanes * classes * static_cast<int64_t>(sizeof(computed_t<S>));
}

// The total and the gradient of rows that shared memory holds; `partials` as rows_total_on has it.
template <class S>
void kept_rows_on(const RowProblem& p, const void* weight, int kind, double number, void* partials, void* losses,
                  void* total, void* grad, void* stream) {
  RowInput<S> input = row_input<S>(p, grad);
  input.lanes = kept_lanes<S>(p.classes);
  const auto out = row_total<computed_t<S>>(losses, weight, kind, number, partials, total, nullptr);
  auto divisor = out;
  divisor.losses = nullptr;
  if (out.kind != RowDivisor::number) add_up_rows(input, divisor, stream);
  Launch on = row_launch(p.rows, input.lanes, row_most_blocks, stream);
  on.shared = static_cast<int>(kept_bytes<S>(p.classes));
  launch(input.packs ? kept_rows<S, true> : kept_rows<S, false>, on, input, out, static_cast<S*>(grad));
  add_up_rows(input, out, stream);
}

template <class S>
void scale_gradient_on(void* grad, int64_t n, const void* by, void* stream) {
  constexpr int64_t most = 1 << 11;  // blocks, which have nothing to do nearly always
  if (n == 0) return;
  launch(scale_gradient<S>, row_launch(n, 1, most, stream), static_cast<S*>(grad), n,
         static_cast<const computed_t<S>*>(by));
}

}  // namespace counterpoise::cuda

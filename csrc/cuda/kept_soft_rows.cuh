// Row-wise family with distributions as targets, a total with its gradient: as kept_rows.cuh has it. Logits stay in shared
// memory; targets are read again from the cache.
#pragma once

#include "kept_rows.cuh"
#include "soft_rows.cuh"

namespace counterpoise::cuda {

constexpr int kept_soft_threads = 512;  // more would leave too few registers

// The gradient of a row from the logits that are kept; zeros where it does not count.
template <bool Packs, class S, class Y>
CP_DEVICE void write_kept_soft(const SoftRowInput<S, Y>& p, const RowGroup& who, int64_t row, bool counts,
                               const computed_t<S>* kept, const math::TargetSoftmax<computed_t<S>>& of_target,
                               const SoftSlopes<computed_t<S>>& s, S* grad) {
  constexpr int width = row_width<S>;
  using T = computed_t<S>;
  const int step = Packs ? 1 : who.lanes;
#pragma unroll 2
  for (int j = who.rank * (Packs ? width : 1); j < p.classes; j += who.lanes * width) {
    T g[width] = {};
    if (counts) {
      T u[width], t[width];
      read_classes<Packs>(kept, j, step, p.classes, -math::infinity<T>, u);
      read_targets<Packs>(p, row, of_target, j, step, p.classes, t);
      soft_slopes_of<Packs>(p, s, u, t, j, step, p.classes, g);
    }
    write_classes<Packs>(g, grad + row * p.classes, j, step, p.classes);
  }
}

template <class S, class Y, bool Packs>
__global__ void __launch_bounds__(kept_soft_threads, 1)
    kept_soft_rows(SoftRowInput<S, Y> p, RowTotal<computed_t<S>> out, S* grad) {
  using T = computed_t<S>;
  CP_DYNAMIC_SHARED(T, shared);
  __shared__ SoftRowShare<T> scratch[warp_size];
  __shared__ LogSum<T> target_scratch[warp_size];
  const RowGroup who(p.lanes);
  T* const kept = shared + who.index * p.classes;
  const double divisor = out.kind == RowDivisor::number ? out.number : *out.divisor;
  for (int64_t base = who.base; base < p.rows; base += who.stride) {
    const int64_t row = base + who.index;
    const bool counts = row < p.rows && p.counts(row);
    const math::TargetSoftmax<T> of_target = target_softmax(p, who, row, counts, target_scratch);
    SoftRowShare<T> s = MergeSoftRows::none<SoftRowShare<T>>();
    if (counts) s = soft_share_of<Packs>(p, who, row, of_target, kept);
    s = who.reduce(s, MergeSoftRows(), scratch);
    if (row >= p.rows) continue;
    const math::SoftRowSums<T> sums{s.top, s.total, s.mass, s.dot, s.live, s.live_weight, s.gap};
    const math::SoftRowSlopes<T> found = counts ? math::soft_row_slopes(sums, p.smoothing) : math::SoftRowSlopes<T>{};
    if (who.rank == 0) out.losses[row] = found.loss;
    const double weight = out.weight == nullptr ? 1.0 : static_cast<double>(out.weight[row]);
    const SoftSlopes<T> slopes{found.top, found.exponent, found.share, static_cast<T>(weight / divisor) * p.scale};
    write_kept_soft<Packs>(p, who, row, counts, kept, of_target, slopes, grad);
  }
}

// The total and the gradient of rows that shared memory holds; `partials` as rows_total_on has it.
template <class S, class Y>
void kept_soft_rows_on(const SoftRowProblem& p, const void* weight, int kind, double number, void* partials, void* losses,
                       void* total, void* grad, void* stream) {
  using T = computed_t<S>;
  SoftRowInput<S, Y> input = soft_row_input<S, Y>(p, grad);
  input.lanes = kept_lanes<S>(p.classes, kept_soft_threads);
  const auto out = row_total<T>(losses, weight, kind, number, partials, total, nullptr);
  auto divisor = out;
  divisor.losses = nullptr;
  if (out.kind != RowDivisor::number) add_up_soft_rows(p, divisor, stream);
  Launch on = row_launch(p.rows, input.lanes, row_most_blocks, stream);
  on.shared = static_cast<int>(kept_bytes<S>(p.classes, kept_soft_threads));
  launch(input.packs ? kept_soft_rows<S, Y, true> : kept_soft_rows<S, Y, false>, on, input, out, static_cast<S*>(grad));
  add_up_soft_rows(p, out, stream);
}

}  // namespace counterpoise::cuda

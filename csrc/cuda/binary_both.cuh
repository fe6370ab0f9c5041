// Element-wise family, a total with its gradient in one pass over the entries, where nothing is masked or weighted.
//
// What the mean divides by is known then, unless an entry drops out (a logit of minus infinity whose label is 0): how
// many count is found on the way. Whether all did is left on the device; where not, the kernels of binary.cuh make the
// total again, and the gradient in the backward pass. They are launched always, and return at once nearly always.
#pragma once

#include "binary.cuh"

namespace counterpoise::cuda {

template <class S>
struct BinaryBoth {
  using T = computed_t<S>;
  double divisor;  // of a row's loss
  double entries;  // that a row's loss is the mean of, 1 = it is their sum
  Two<double>* partials;
  T *total, *divided_by;  // divided_by: the divisor, and 1 where all entries counted
  S* grad;
};

template <class S>
CP_DEVICE void write_both(const Two<double>& all, int64_t n, const BinaryBoth<S>& out) {
  using T = computed_t<S>;
  *out.total = static_cast<T>(all.first / (out.divisor * out.entries));
  out.divided_by[0] = static_cast<T>(out.divisor);
  out.divided_by[1] = all.second == static_cast<double>(n) ? T(1) : T(0);
}

template <class S, class Form>
__global__ void __launch_bounds__(binary_threads, binary_resident) binary_both_flat(BinaryInput<S> p, BinaryBoth<S> out) {
  using T = computed_t<S>;
  constexpr int width = BinaryEntries<S>::width;
  __shared__ Two<double> scratch[warp_size];
  const int64_t n = p.rows * p.row;
  const T by = static_cast<T>(1 / (out.divisor * out.entries));
  Two<double> mine{0, 0};
  for (int64_t at = grid_first() * width; at < n; at += grid_stride() * width) {
    BinaryEntries<S> e;
    read<true>(p, 0, at, 1, n, true, e);
    T slope[width], sum = 0, count = 0;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      slope[k] = 0;
      if (!e.live[k]) continue;
      const math::ValueSlope<T> found = weighted<Form>(p, 0, e.z[k], e.t[k]);
      slope[k] = by * found.slope;
      sum += found.value;
      count += T(1);
    }
    store_some(slope, out.grad, at, 1, n, at + width <= n);
    mine.first += static_cast<double>(sum);
    mine.second += static_cast<double>(count);
  }
  give_share(mine, out.partials, scratch, [&](const Two<double>& all) { write_both(all, n, out); });
}

template <class S>
__global__ void __launch_bounds__(binary_threads) binary_conclude_both(int64_t n, BinaryBoth<S> out, int partials) {
  __shared__ Two<double> scratch[warp_size];
  add_shares(out.partials, partials, scratch, [&](const Two<double>& all) { write_both(all, n, out); });
}

// The total and its gradient; `divided_by` has room for two numbers, for binary_grad_on's `settled`.
template <class S>
void binary_both_on(const BinaryProblem& problem, const BinaryTotal& t, void* grad, void* stream) {
  using T = computed_t<S>;
  const BinaryInput<S> p = binary_input<S>(problem, false);
  const double rows = p.rows > 0 ? static_cast<double>(p.rows) : 1.0;
  const BinaryBoth<S> out = {t.divisor != 0 ? t.divisor : rows,
                             t.mean && p.row > 0 ? static_cast<double>(p.row) : 1.0,
                             static_cast<Two<double>*>(t.partials),
                             static_cast<T*>(t.total),
                             static_cast<T*>(t.divided_by),
                             static_cast<S*>(grad)};
  const int64_t blocks = binary_grid(p, binary_partials);
  with_binary_form(static_cast<math::BinaryKind>(problem.kind), p.c, [&](auto form) {
    launch(binary_both_flat<S, decltype(form)>, {blocks, binary_threads, stream}, p, out);
  });
  if (blocks > 1)
    launch(binary_conclude_both<S>, {1, binary_threads, stream}, p.rows * p.row, out, static_cast<int>(blocks));
  BinaryTotal again = t;
  again.settled = out.divided_by + 1;
  binary_total_on<S>(problem, again, stream);
}

}  // namespace counterpoise::cuda

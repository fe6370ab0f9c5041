// Element-wise family: value and slope of every entry, summed, by row, or written.
//
// Entries lie flat where it does not matter which row one belongs to: a thread then takes several neighbours at once.
// Else a row belongs to a few neighbouring threads, to a warp, or to a block, by its length. Sums are added in double,
// in an order that shape and alignment decide: the same result on every run and on every GPU. Nothing waits for the host:
// how many rows count is found, and divided by, on the device.
#pragma once

#include "binary_input.cuh"

namespace counterpoise::cuda {

constexpr int binary_threads = 256;
constexpr int binary_resident = 4;               // blocks on a multiprocessor, at least: up to 64 registers a thread
constexpr int64_t binary_partials = 2048;       // at most as many blocks share a sum: their partial sums are added last
constexpr int64_t binary_most_blocks = 1 << 16;  // of kernels that write
constexpr int binary_long_row = 1 << 13;         // entries from which on a row takes a block

// Where values go: to their rows, or (with `sums` null) to the total.
template <class T>
struct BinarySums {
  T *sums, *counts;
  const T* weight;  // (rows), null = ones
  bool mean;        // over the row's entries that count
  Two<double>* partials;
  double divisor;  // 0: how many rows count
  T *total, *divided_by;
  const T* settled;  // 1 = the total is there already; null = it is not
};

template <class T>
CP_DEVICE bool is_settled(const T* settled) {
  return settled != nullptr && *settled == 1;
}

// Slopes are multiplied by by_row * upstream / divisor, each 1 where null.
template <class S>
struct BinaryGrad {
  using T = computed_t<S>;
  const T *by_row, *upstream, *divisor;
  bool mean;
  S* grad;
  const T* settled;  // 1 = the gradient is there already, for an upstream of 1; null = it is not

  CP_DEVICE bool is_there() const { return is_settled(settled) && (upstream == nullptr || *upstream == 1); }
};

template <math::BinaryKind Kind, bool Whole, bool Margin>
struct BinaryForm {
  static constexpr bool weighs_positives = Kind == math::BinaryKind::focal;  // cross-entropy is one; spares registers

  template <class T>
  static CP_DEVICE math::ValueSlope<T> at(T z, T t, const math::BinaryParameters<T>& c) {
    if constexpr (Kind == math::BinaryKind::focal_star) return math::focal_star(z, t, c);
    constexpr int known = Whole ? math::whole_power : math::any_power;
    if (t > 0 && t < 1) return math::binary_soft<Kind, known>(z, t, c);
    return math::binary_hard<Kind, known, known, Margin, false>(z, t, c);
  }
};

// ---- entries ----------------------------------------------------------------------------------------------------

// Value and slope of the entry at `j` of its row, weighted by class.
template <class Form, class S, class T>
CP_DEVICE math::ValueSlope<T> weighted(const BinaryInput<S>& p, int64_t j, T z, T t) {
  T positive = 1;
  if constexpr (Form::weighs_positives) {
    if (p.positive_weight != nullptr) positive = math::weigh_positive(p.positive_weight[j], t);
  }
  const math::ValueSlope<T> found = Form::at(z, t, p.c);
  if (p.entry_weight == nullptr) return found;
  const T weight = p.entry_weight[j] * positive;
  return {weight * found.value, weight * found.slope};
}

// ---- sums -------------------------------------------------------------------------------------------------------

template <class T>
CP_DEVICE void write_total(const Two<double>& all, const BinarySums<T>& out) {
  const double counted = all.second > 1 ? all.second : 1;
  const double divisor = out.divisor != 0 ? out.divisor : counted;
  *out.total = static_cast<T>(all.first / divisor);
  *out.divided_by = static_cast<T>(divisor);
}

template <class T>
__global__ void __launch_bounds__(binary_threads, binary_resident) binary_conclude(BinarySums<T> out, int partials) {
  __shared__ Two<double> scratch[warp_size];
  if (is_settled(out.settled)) return;
  add_shares(out.partials, partials, scratch, [&](const Two<double>& all) { write_total(all, out); });
}

template <class S, class Form>
__global__ void __launch_bounds__(binary_threads, binary_resident) binary_sums_flat(BinaryInput<S> p, BinarySums<computed_t<S>> out) {
  using T = computed_t<S>;
  constexpr int width = BinaryEntries<S>::width;
  __shared__ Two<double> scratch[warp_size];
  if (is_settled(out.settled)) return;
  const int64_t n = p.rows * p.row;
  Two<double> mine{0, 0};
  for (int64_t at = grid_first() * width; at < n; at += grid_stride() * width) {
    BinaryEntries<S> e;
    read<true>(p, 0, at, 1, n, true, e);
    T value[width], live[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      value[k] = e.live[k] ? weighted<Form>(p, 0, e.z[k], e.t[k]).value : T(0);
      live[k] = e.live[k] ? T(1) : T(0);
    }
    if (out.sums != nullptr) {
      if (at + width <= n) {
        store_pack(value, out.sums + at);
        store_pack(live, out.counts + at);
      } else {
        for (int k = 0; k < width; ++k) {
          if (at + k >= n) break;
          out.sums[at + k] = value[k];
          out.counts[at + k] = live[k];
        }
      }
      continue;
    }
    T sum = 0, count = 0;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      sum += out.weight != nullptr && e.live[k] ? out.weight[at + k] * value[k] : value[k];
      count += live[k];
    }
    mine.first += static_cast<double>(sum);
    mine.second += static_cast<double>(count);
  }
  if (out.sums != nullptr) return;
  give_share(mine, out.partials, scratch, [&](const Two<double>& all) { write_total(all, out); });
}

template <class S, class Form>
__global__ void __launch_bounds__(binary_threads, binary_resident) binary_sums_rows(BinaryInput<S> p, BinarySums<computed_t<S>> out) {
  using T = computed_t<S>;
  constexpr int width = BinaryEntries<S>::width;
  __shared__ Two<double> scratch[warp_size];
  if (is_settled(out.settled)) return;
  const Sharing who(p.lanes);
  Two<double> mine{0, 0};
  for (int64_t first = int64_t(blockIdx.x) * who.groups; first < p.rows; first += int64_t(gridDim.x) * who.groups) {
    const int64_t r = first + who.group;
    Two<double> row{0, 0};
    if (r < p.rows) {
      for_entries<S, true>(p, who, r, [&](const BinaryEntries<S>& e, int64_t j, int step) {
        T sum = 0, count = 0;
#pragma unroll
        for (int k = 0; k < width; ++k) {
          if (!e.live[k]) continue;
          sum += weighted<Form>(p, j + k * step, e.z[k], e.t[k]).value;
          count += T(1);
        }
        row.first += static_cast<double>(sum);
        row.second += static_cast<double>(count);
      });
    }
    row = who.sum(row, scratch);
    if (r >= p.rows || who.rank != 0) continue;
    if (out.sums != nullptr) {
      out.sums[r] = static_cast<T>(row.first);
      out.counts[r] = static_cast<T>(row.second);
    } else if (row.second > 0) {
      const double weight = out.weight == nullptr ? 1.0 : static_cast<double>(out.weight[r]);
      mine.first += weight * (out.mean ? row.first / row.second : row.first);
      mine.second += 1;
    }
  }
  if (out.sums != nullptr) return;
  give_share(mine, out.partials, scratch, [&](const Two<double>& all) { write_total(all, out); });
}

// ---- gradients --------------------------------------------------------------------------------------------------

template <class S>
CP_DEVICE computed_t<S> scale_of(const BinaryGrad<S>& out) {
  using T = computed_t<S>;
  const T scale = out.upstream == nullptr ? T(1) : *out.upstream;
  return out.divisor == nullptr ? scale : scale / *out.divisor;
}

template <int N, class T, class S>
CP_DEVICE void store_some(const T (&from)[N], S* to, int64_t j, int step, int64_t end, bool pack) {
  if (pack) return store_pack(from, to + j);
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (j + k * step < end) to[j + k * step] = Narrow<S>::from(from[k]);
}

template <class S, class Form>
__global__ void __launch_bounds__(binary_threads, binary_resident) binary_grad_flat(BinaryInput<S> p, BinaryGrad<S> out) {
  using T = computed_t<S>;
  constexpr int width = BinaryEntries<S>::width;
  if (out.is_there()) return;
  const int64_t n = p.rows * p.row;
  const T scale = scale_of(out);
  for (int64_t at = grid_first() * width; at < n; at += grid_stride() * width) {
    BinaryEntries<S> e;
    read<false>(p, 0, at, 1, n, true, e);
    T slope[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const T factor = out.by_row == nullptr || at + k >= n ? scale : scale * out.by_row[at + k];
      slope[k] = e.live[k] ? factor * weighted<Form>(p, 0, e.z[k], e.t[k]).slope : T(0);
    }
    store_some(slope, out.grad, at, 1, n, at + width <= n);
  }
}

template <class S, class Form>
__global__ void __launch_bounds__(binary_threads, binary_resident) binary_grad_rows(BinaryInput<S> p, BinaryGrad<S> out) {
  using T = computed_t<S>;
  constexpr int width = BinaryEntries<S>::width;
  __shared__ Two<double> scratch[warp_size];
  if (out.is_there()) return;
  const Sharing who(p.lanes);
  const T scale = scale_of(out);
  for (int64_t first = int64_t(blockIdx.x) * who.groups; first < p.rows; first += int64_t(gridDim.x) * who.groups) {
    const int64_t r = first + who.group;
    T factor = r >= p.rows || out.by_row == nullptr ? scale : scale * out.by_row[r];
    if (out.mean) {
      Two<double> count{0, 0};
      if (r < p.rows) {
        for_entries<S, false>(p, who, r, [&](const BinaryEntries<S>& e, int64_t, int) {
          int live = 0;
#pragma unroll
          for (int k = 0; k < width; ++k) live += e.live[k];
          count.first += live;
        });
      }
      count = who.sum(count, scratch);
      factor /= static_cast<T>(count.first > 1 ? count.first : 1);
    }
    if (r >= p.rows) continue;
    for_entries<S, false>(p, who, r, [&](const BinaryEntries<S>& e, int64_t j, int step) {
      T slope[width];
#pragma unroll
      for (int k = 0; k < width; ++k) {
        slope[k] = 0;
        if (!e.live[k]) continue;
        slope[k] = factor * weighted<Form>(p, j + k * step, e.z[k], e.t[k]).slope;
      }
      store_some(slope, out.grad + r * p.row, j, step, p.row, p.packs);
    });
  }
}

// ---- on the host: which kernel, and how many threads ------------------------------------------------------------

// The threads that share a row: each with four sets of entries or so, but neighbours enough for whole sectors.
inline int binary_lanes(int64_t row, int width) {
  if (row >= binary_long_row) return binary_threads;
  const int64_t wanted = (row + 4 * width - 1) / (4 * width);
  int lanes = 1;
  while (lanes < warp_size && (lanes < wanted || (lanes < 4 && lanes < row))) lanes *= 2;
  return lanes;
}

inline int64_t binary_blocks(int64_t entries_or_rows, int64_t a_block, int64_t most) {
  const int64_t wanted = (entries_or_rows + a_block - 1) / a_block;
  return wanted < 1 ? 1 : (wanted < most ? wanted : most);
}

template <class S>
bool binary_takes_packs(const BinaryProblem& p, int64_t row) {
  constexpr int N = binary_width<S>;
  bool labels = false;
  switch (p.target_type) {
    case Type::float64: labels = takes_packs<double, N>(p.target, row); break;
    case Type::int64: labels = takes_packs<int64_t, N>(p.target, row); break;
    case Type::uint8: labels = takes_packs<uint8_t, N>(p.target, row); break;
    case Type::bfloat16:
    case Type::float16: labels = takes_packs<bfloat16, N>(p.target, row); break;
    default: labels = takes_packs<float, N>(p.target, row);
  }
  const bool masks = p.mask == nullptr || !p.mask_by_entry || takes_packs<uint8_t, N>(p.mask, row);
  return labels && masks && takes_packs<S, N>(p.logits, row);
}

// `by_row`: whether something depends on the row that an entry belongs to.
template <class S>
BinaryInput<S> binary_input(const BinaryProblem& p, bool by_row) {
  using T = computed_t<S>;
  const bool flat = p.row == 1 || !(by_row || p.entry_weight != nullptr || (p.mask != nullptr && !p.mask_by_entry));
  const math::BinaryParameters<T> c = {math::exponent<T>(p.gamma_pos), math::exponent<T>(p.gamma_neg),
                                       static_cast<T>(p.alpha_pos),    static_cast<T>(p.alpha_neg),
                                       static_cast<T>(p.margin),       static_cast<T>(p.log_eps),
                                       static_cast<T>(p.beta),         p.detach};
  BinaryProblem q = p;
  q.mask_by_entry = p.mask_by_entry || p.row == 1;
  const bool packs = flat ? binary_takes_packs<S>(q, binary_width<S>) : binary_takes_packs<S>(q, p.row);
  return {static_cast<const S*>(p.logits),
          p.target,
          p.target_type,
          p.mask,
          q.mask_by_entry,
          static_cast<const T*>(p.entry_weight),
          static_cast<const T*>(p.positive_weight),
          p.rows,
          p.row,
          packs,
          flat ? 0 : binary_lanes(p.row, binary_width<S>),
          c};
}

template <class S>
int64_t binary_grid(const BinaryInput<S>& p, int64_t most) {
  return p.lanes == 0 ? binary_blocks(p.rows * p.row, int64_t(binary_threads) * binary_width<S>, most)
                      : binary_blocks(p.rows, binary_threads / p.lanes, most);
}

// Calls f with the form that these settings take.
template <class T, class F>
void with_binary_form(math::BinaryKind kind, const math::BinaryParameters<T>& c, F&& f) {
  using math::BinaryKind;
  const bool whole = c.gamma_pos.whole >= 0 && c.gamma_neg.whole >= 0, margin = c.margin > 0;
  switch (kind) {
    case BinaryKind::focal_star: return f(BinaryForm<BinaryKind::focal_star, true, false>());
    case BinaryKind::focal:
      return whole ? f(BinaryForm<BinaryKind::focal, true, false>()) : f(BinaryForm<BinaryKind::focal, false, false>());
    case BinaryKind::asymmetric: break;
  }
  if (whole) {
    margin ? f(BinaryForm<BinaryKind::asymmetric, true, true>()) : f(BinaryForm<BinaryKind::asymmetric, true, false>());
  } else {
    margin ? f(BinaryForm<BinaryKind::asymmetric, false, true>()) : f(BinaryForm<BinaryKind::asymmetric, false, false>());
  }
}

// Sums and counts of rows, in the type that is computed in.
template <class S>
void binary_rows_on(const BinaryProblem& problem, void* sums, void* counts, void* stream) {
  using T = computed_t<S>;
  const BinaryInput<S> p = binary_input<S>(problem, true);
  if (p.rows == 0) return;
  const BinarySums<T> out = {static_cast<T*>(sums), static_cast<T*>(counts), nullptr, false, nullptr, 1, nullptr, nullptr, nullptr};
  with_binary_form(static_cast<math::BinaryKind>(problem.kind), p.c, [&](auto form) {
    using Form = decltype(form);
    const auto kernel = p.lanes == 0 ? binary_sums_flat<S, Form> : binary_sums_rows<S, Form>;
    launch(kernel, {binary_grid(p, binary_most_blocks), binary_threads, stream}, p, out);
  });
}

// What a total needs beside the entries, and where it goes; `partials` holds binary_partials pairs of doubles.
struct BinaryTotal {
  const void* weight;
  bool mean;
  double divisor;
  void *partials, *total, *divided_by;
  const void* settled = nullptr;  // of the type that is computed in, see BinarySums
};

template <class S>
void binary_total_on(const BinaryProblem& problem, const BinaryTotal& t, void* stream) {
  using T = computed_t<S>;
  const BinaryInput<S> p = binary_input<S>(problem, t.divisor == 0 || t.mean || t.weight != nullptr);
  const BinarySums<T> out = {nullptr,   nullptr, static_cast<const T*>(t.weight), t.mean, static_cast<Two<double>*>(t.partials),
                             t.divisor, static_cast<T*>(t.total), static_cast<T*>(t.divided_by), static_cast<const T*>(t.settled)};
  const int64_t blocks = binary_grid(p, binary_partials);
  with_binary_form(static_cast<math::BinaryKind>(problem.kind), p.c, [&](auto form) {
    using Form = decltype(form);
    const auto kernel = p.lanes == 0 ? binary_sums_flat<S, Form> : binary_sums_rows<S, Form>;
    launch(kernel, {blocks, binary_threads, stream}, p, out);
  });
  if (blocks > 1) launch(binary_conclude<T>, {1, binary_threads, stream}, out, static_cast<int>(blocks));
}

// Slopes times by_row * upstream / divisor, over the row's count with `mean`; all in the type that is computed in.
template <class S>
void binary_grad_on(const BinaryProblem& problem, const void* by_row, const void* upstream, const void* divisor,
                    bool mean, void* grad, void* stream, const void* settled = nullptr) {
  using T = computed_t<S>;
  const BinaryInput<S> p = binary_input<S>(problem, mean || by_row != nullptr);
  if (p.rows == 0) return;
  const BinaryGrad<S> out = {static_cast<const T*>(by_row), static_cast<const T*>(upstream),
                             static_cast<const T*>(divisor), mean, static_cast<S*>(grad), static_cast<const T*>(settled)};
  with_binary_form(static_cast<math::BinaryKind>(problem.kind), p.c, [&](auto form) {
    using Form = decltype(form);
    const auto kernel = p.lanes == 0 ? binary_grad_flat<S, Form> : binary_grad_rows<S, Form>;
    launch(kernel, {binary_grid(p, binary_most_blocks), binary_threads, stream}, p, out);
  });
}

}  // namespace counterpoise::cuda

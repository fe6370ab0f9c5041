// Row-wise family with distributions as targets: a row is read once, in chunks of adjusted logits and targets whose sums
// are taken relative to the largest logit so far. Where the gradient is wanted with the loss, it is made from the row
// again while that is still in the cache.
#include "../soft_rows.h"

#include "../../math/soft_rows.h"
#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

using math::SoftRowSlopes;

constexpr int64_t chunk = soft_row_chunk;

inline int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// One chunk: adjusted logits, masked classes and the padding at -infinity; targets; e_c; u_c - top, for a divergence
// less log t_c.
template <class T>
struct SoftChunk {
  alignas(64) T u[chunk], t[chunk], e[chunk], below[chunk];
};

// Sums over a row as far as it has been read, see math::SoftRowSums.
struct SoftPiece {
  double top, total, mass, dot, live, live_weight, gap;
};

// Whether one of them lies outside [0, 1], in the type in which they are given.
template <class T, class S>
bool read_targets(const S* __restrict from, int64_t n, T* __restrict t) {
  int outside = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto x = widen(from[i]);
    outside |= !(x >= 0) | !(x <= 1);
    t[i] = static_cast<T>(x);
  }
  return outside != 0;
}

// A problem with its numbers at hand.
template <class T>
struct SoftRows {
  const SoftRowProblem& p;
  T scale, smoothing;
  const T *multiplicative, *additive, *margin, *class_weight;

  explicit SoftRows(const SoftRowProblem& p)
      : p(p), scale(static_cast<T>(p.scale)), smoothing(static_cast<T>(p.smoothing)),
        multiplicative(static_cast<const T*>(p.multiplicative)), additive(static_cast<const T*>(p.additive)),
        margin(static_cast<const T*>(p.margin)), class_weight(static_cast<const T*>(p.class_weight)) {}

  int64_t length(int64_t from) const { return p.classes - from < chunk ? p.classes - from : chunk; }

  // Classes [from, from + n) of a row; whether a target lies outside [0, 1].
  bool fill(int64_t row, int64_t from, int64_t n, SoftChunk<T>& k) const {
    const int64_t at = row * p.classes + from;
    const bool bad = with_float_type(
        p.target_type, [&](auto* s) { return read_targets(static_cast<decltype(s)>(p.target) + at, n, k.t); });
    with_float_type(p.logits_type, [&](auto* s) { load(static_cast<decltype(s)>(p.logits) + at, n, k.u); });
    if (multiplicative != nullptr)
      for (int64_t i = 0; i < n; ++i) k.u[i] *= multiplicative[from + i];
    if (additive != nullptr)
      for (int64_t i = 0; i < n; ++i) k.u[i] += additive[from + i];
    if (margin != nullptr)
      for (int64_t i = 0; i < n; ++i) k.u[i] -= margin[from + i] * k.t[i];
    if (scale != 1)
      for (int64_t i = 0; i < n; ++i) k.u[i] *= scale;
    for (int64_t i = n; i < padded(n); ++i) {
      k.u[i] = -math::infinity<T>;
      k.t[i] = 0;
    }
    return bad;
  }

  void write(const SoftChunk<T>& k, int64_t n, void* grad, int64_t at) const {
    with_float_type(p.logits_type, [&](auto* s) {
      store(k.e, n, static_cast<std::remove_const_t<std::remove_pointer_t<decltype(s)>>*>(grad) + at);
    });
  }
};

// Calls f with the problem in the type that it is computed in.
template <class F>
auto with_soft_rows(const SoftRowProblem& p, F&& f) {
  return p.logits_type == Type::float64 ? f(SoftRows<double>(p)) : f(SoftRows<float>(p));
}

template <class T>
void exponentials(const SoftChunk<T>& k, int64_t n, T top, T* __restrict e) {
  for (int64_t i = 0; i < n; ++i) e[i] = math::exp(k.u[i] - top);
}

// Raises the top of what has been added up so far.
void raise(double top, double factor, SoftPiece& piece) {
  const double by = piece.top - top;
  if (by > -math::infinity<double>) {
    piece.total *= factor;
    piece.dot += math::vanishing(piece.mass, by);
    piece.gap += piece.live_weight * by;
  }
  piece.top = top;
}

// Adds a chunk, whose e and below are relative to the piece's top.
template <class T>
void add_chunk(const SoftRows<T>& r, int64_t from, int64_t n, const SoftChunk<T>& k, SoftPiece& piece) {
  using V = typename Wide<T>::type;
  const T* w = r.class_weight == nullptr ? nullptr : r.class_weight + from;
  V mass = {}, dot = {}, live = {}, weight = {}, gap = {};
  const V zeros = {}, ones = zeros + T(1);
  for (int64_t i = 0; i < padded(n); i += lanes) {
    V a, below, each = ones;
    __builtin_memcpy(&a, k.t + i, sizeof(a));
    __builtin_memcpy(&below, k.below + i, sizeof(below));
    if (w != nullptr) {
      __builtin_memcpy(&each, w + i, (n - i < lanes ? n - i : lanes) * sizeof(T));
      a *= each;
    }
    mass += a;
    dot += a == zeros ? zeros : a * below;
    if (r.smoothing == 0) continue;
    const auto here = below > -math::infinity<T>;
    live += here ? ones : zeros;
    weight += here ? each : zeros;
    gap += here ? each * below : zeros;
  }
  piece.total += static_cast<double>(sum(k.e, padded(n)));
  for (int64_t lane = 0; lane < lanes; ++lane) {
    piece.mass += mass[lane];
    piece.dot += dot[lane];
    piece.live += live[lane];
    piece.live_weight += weight[lane];
    piece.gap += gap[lane];
  }
}

// Sums over a row; `bad` becomes true where a target lies outside [0, 1].
template <class T>
math::SoftRowSums<T> sums_of(const SoftRows<T>& r, int64_t row, SoftChunk<T>& k, bool& bad) {
  SoftPiece piece{-math::infinity<double>, 0, 0, 0, 0, 0, 0};
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from);
    bad |= r.fill(row, from, n, k);
    const T here = largest(k.u, padded(n));
    if (here > static_cast<T>(piece.top))
      raise(static_cast<double>(here), static_cast<double>(math::exp(static_cast<T>(piece.top) - here)), piece);
    // Relative to zero as long as every class was masked: inf - inf would be NaN.
    const T top = piece.top > -math::infinity<double> ? static_cast<T>(piece.top) : T(0);
    for (int64_t i = 0; i < padded(n); ++i) k.below[i] = k.u[i] - top;
    exponentials(k, padded(n), top, k.e);
    if (r.p.divergence)
      for (int64_t i = 0; i < n; ++i) k.below[i] -= math::log_of_target(k.t[i]);
    add_chunk(r, from, n, k, piece);
  }
  return {static_cast<T>(piece.top),  static_cast<T>(piece.total),       static_cast<T>(piece.mass),
          static_cast<T>(piece.dot),  static_cast<T>(piece.live),        static_cast<T>(piece.live_weight),
          static_cast<T>(piece.gap)};
}

// The exponentials in k.e become gradients. What would become subnormal is zero: such products are slow, and nothing
// beside a row's largest slope.
template <class T>
void slopes_in_chunk(const SoftRows<T>& r, int64_t from, int64_t n, const SoftRowSlopes<T>& s, T factor,
                     SoftChunk<T>& k) {
  factor *= r.scale;
  const T product = s.exponent * factor, hard = 1 - r.smoothing;
  const T least = std::numeric_limits<T>::min() / (product < 0 ? -product : product);
  const T* w = r.class_weight == nullptr ? nullptr : r.class_weight + from;
  if (r.smoothing != 0)
    for (int64_t i = 0; i < n; ++i) k.t[i] = hard * k.t[i] + (k.u[i] > -math::infinity<T> ? s.share : T(0));
  if (w != nullptr)
    for (int64_t i = 0; i < n; ++i) k.t[i] *= w[i];
  for (int64_t i = 0; i < n; ++i) k.e[i] = ((k.e[i] < least ? T(0) : k.e[i]) * s.exponent - k.t[i]) * factor;
  if (r.multiplicative != nullptr)
    for (int64_t i = 0; i < n; ++i) k.e[i] *= r.multiplicative[from + i];
}

// With `at_hand` a row of one chunk is in it already.
template <class T>
void write_row(const SoftRows<T>& r, int64_t row, const SoftRowSlopes<T>& s, T factor, bool at_hand, void* grad,
               SoftChunk<T>& k) {
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from);
    if (!at_hand || r.p.classes > chunk) {
      r.fill(row, from, n, k);
      exponentials(k, padded(n), s.top, k.e);
    }
    slopes_in_chunk(r, from, n, s, factor, k);
    r.write(k, n, grad, row * r.p.classes + from);
  }
}

template <class T>
void write_zeros(const SoftRows<T>& r, int64_t row, void* grad, SoftChunk<T>& k) {
  for (int64_t i = 0; i < chunk; ++i) k.e[i] = 0;
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from);
    r.write(k, n, grad, row * r.p.classes + from);
  }
}

template <class T>
void keep_state(const SoftRowSlopes<T>& s, T* state) {
  state[0] = s.top;
  state[1] = s.exponent;
  state[2] = s.share;
}

bool rows(const SoftRowProblem& p, int64_t begin, int64_t end, const void* weight, double scale, void* losses,
          void* state, void* grad) {
  return with_soft_rows(p, [&]<class T>(const SoftRows<T>& r) {
    const T* w = static_cast<const T*>(weight);
    SoftChunk<T> k;
    bool bad = false;
    for (int64_t row = begin; row < end; ++row) {
      const bool counts = row_counts(p, row);
      const auto s = counts ? math::soft_row_slopes(sums_of(r, row, k, bad), r.smoothing) : SoftRowSlopes<T>{};
      static_cast<T*>(losses)[row] = s.loss;
      if (state != nullptr) keep_state(s, static_cast<T*>(state) + row * soft_row_state);
      if (grad == nullptr) continue;
      if (!counts) {
        write_zeros(r, row, grad, k);
      } else {
        write_row(r, row, s, static_cast<T>(scale) * (w == nullptr ? T(1) : w[row]), true, grad, k);
      }
    }
    return bad;
  });
}

void backward(const SoftRowProblem& p, int64_t begin, int64_t end, const void* state, const void* by_row, void* grad) {
  with_soft_rows(p, [&]<class T>(const SoftRows<T>& r) {
    SoftChunk<T> k;
    for (int64_t row = begin; row < end; ++row) {
      const T* its = static_cast<const T*>(state) + row * soft_row_state;
      if (row_counts(p, row)) {
        const SoftRowSlopes<T> s = {0, its[0], its[1], its[2]};
        write_row(r, row, s, static_cast<const T*>(by_row)[row], false, grad, k);
      } else {
        write_zeros(r, row, grad, k);
      }
    }
  });
}

}  // namespace

const SoftRowTable soft_row_table = {rows, backward};

}  // namespace counterpoise::CP_ARCH

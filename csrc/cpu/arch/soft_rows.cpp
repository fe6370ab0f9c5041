// Row-wise family with distributions as targets: a row is read once, in chunks of adjusted logits and targets whose
// sums are taken relative to the largest logit so far. Where the gradient is wanted with the loss, the exponentials are
// kept in its memory and become the gradient in a second pass, while the row is still in the cache; those of a long row
// of a narrow type, which has no room for them, are made again.
#include "../soft_rows.h"

#include "../../math/soft_rows.h"
#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

using math::SoftRowSlopes;
using math::TargetSoftmax;

constexpr int64_t chunk = soft_row_chunk;

inline int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// What of one chunk does not lie elsewhere as it is wanted: adjusted logits; targets, the padding zero; u_c - top, for
// a divergence less log t_c, the padding -infinity; e_c.
template <class T>
struct SoftChunk {
  alignas(64) T u[chunk], t[chunk], below[chunk], e[chunk];
  TargetSoftmax<T> of_target;  // of the row, where targets are logits
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
  T scale, smoothing, target_scale;
  const T *multiplicative, *additive, *margin, *class_weight;

  explicit SoftRows(const SoftRowProblem& p)
      : p(p), scale(static_cast<T>(p.scale)), smoothing(static_cast<T>(p.smoothing)),
        target_scale(static_cast<T>(p.target_scale)), multiplicative(static_cast<const T*>(p.multiplicative)),
        additive(static_cast<const T*>(p.additive)), margin(static_cast<const T*>(p.margin)),
        class_weight(static_cast<const T*>(p.class_weight)) {}

  int64_t length(int64_t from) const { return p.classes - from < chunk ? p.classes - from : chunk; }

  // Whether gradients are of the type that is computed in, so that e_c may stand in their place.
  bool direct() const { return p.logits_type == Type::float32 || p.logits_type == Type::float64; }

  // Where the e_c of classes from `from` on are put.
  T* place(void* grad, int64_t row, int64_t from, SoftChunk<T>& k) const {
    return grad != nullptr && direct() ? static_cast<T*>(grad) + row * p.classes + from : k.e;
  }

  // Targets of classes [from, from + n) of a row into k.t; whether one lies outside [0, 1].
  bool targets(int64_t row, int64_t from, int64_t n, SoftChunk<T>& k) const {
    const int64_t at = row * p.classes + from;
    for (int64_t i = n; i < padded(n); ++i) k.t[i] = 0;
    if (target_scale != 0) {
      target_logits(row, from, n, k);
      for (int64_t i = 0; i < n; ++i) k.t[i] = math::exp_of_negative(k.t[i] - k.of_target.top) * k.of_target.factor;
      return false;
    }
    return with_float_type(p.target_type, [&](auto* s) {
      return read_targets(static_cast<decltype(s)>(p.target) + at, n, k.t);
    });
  }

  // The logits that classes [from, from + n) have for targets, scaled, into k.t.
  void target_logits(int64_t row, int64_t from, int64_t n, SoftChunk<T>& k) const {
    with_float_type(p.target_type, [&](auto* s) {
      load(static_cast<decltype(s)>(p.target) + row * p.classes + from, n, k.t);
    });
    for (int64_t i = 0; i < n; ++i) k.t[i] *= target_scale;
  }

  // Adjusted logits of classes [from, from + n), whose targets are in k.t.
  const T* logits(int64_t row, int64_t from, int64_t n, SoftChunk<T>& k) const {
    const T* z = in_place(p.logits, p.logits_type, row * p.classes + from, n, k.u);
    if (multiplicative == nullptr && additive == nullptr && margin == nullptr && scale == 1) return z;
    if (z != k.u) load(z, n, k.u);
    if (multiplicative != nullptr)
      for (int64_t i = 0; i < n; ++i) k.u[i] *= multiplicative[from + i];
    if (additive != nullptr)
      for (int64_t i = 0; i < n; ++i) k.u[i] += additive[from + i];
    if (margin != nullptr)
      for (int64_t i = 0; i < n; ++i) k.u[i] -= margin[from + i] * k.t[i];
    for (int64_t i = 0; i < n; ++i) k.u[i] *= scale;
    return k.u;
  }

  // Gradients that do not stand in their place already.
  void write(const T* g, int64_t row, int64_t from, int64_t n, void* grad, const SoftChunk<T>& k) const {
    if (g != k.e) return;
    with_float_type(p.logits_type, [&](auto* s) {
      store(g, n, static_cast<std::remove_const_t<std::remove_pointer_t<decltype(s)>>*>(grad) + row * p.classes + from);
    });
  }
};

// Calls f with the problem in the type that it is computed in.
template <class F>
auto with_soft_rows(const SoftRowProblem& p, F&& f) {
  return p.logits_type == Type::float64 ? f(SoftRows<double>(p)) : f(SoftRows<float>(p));
}

template <class T>
void exponentials(const T* __restrict u, int64_t n, T top, T* __restrict below, T* __restrict e) {
  for (int64_t i = 0; i < n; ++i) {
    below[i] = u[i] - top;
    e[i] = math::exp_of_negative(below[i]);
  }
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

// Sets of_target; the row is then in the cache.
template <class T>
void look_at_target(const SoftRows<T>& r, int64_t row, SoftChunk<T>& k) {
  if (r.target_scale == 0) return;
  T top = -math::infinity<T>;
  double total = 0;
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from);
    r.target_logits(row, from, n, k);
    const T here = largest(k.t, n);
    if (here > top) {
      total *= static_cast<double>(math::exp(top - here));
      top = here;
    }
    exponentials(k.t, n, top > -math::infinity<T> ? top : T(0), k.below, k.e);
    total += static_cast<double>(sum(k.e, n));
  }
  k.of_target = {top, static_cast<T>(1 / total)};
}

// Adds the targets of a chunk, whose k.below is relative to the piece's top.
template <class T>
void add_targets(const SoftRows<T>& r, int64_t from, int64_t n, const SoftChunk<T>& k, SoftPiece& piece) {
  using V = typename Wide<T>::type;
  const T* w = r.class_weight == nullptr ? nullptr : r.class_weight + from;
  V mass = {}, dot = {}, live = {}, weight = {}, gap = {};
  const V zeros = {}, ones = zeros + T(1);
  for (int64_t i = 0; i < padded(n); i += Wide<T>::width) {
    V a, below, each = ones;
    __builtin_memcpy(&a, k.t + i, sizeof(a));
    __builtin_memcpy(&below, k.below + i, sizeof(below));
    if (w != nullptr && i < n) {
      __builtin_memcpy(&each, w + i, least(n - i, Wide<T>::width) * sizeof(T));
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
  for (int64_t lane = 0; lane < Wide<T>::width; ++lane) {
    piece.mass += mass[lane];
    piece.dot += dot[lane];
    piece.live += live[lane];
    piece.live_weight += weight[lane];
    piece.gap += gap[lane];
  }
}

// Sums over a row, whose exponentials go to their place in `grad` and what each chunk's are relative to into `tops`
// (null = nowhere). `bad` becomes true where a target lies outside [0, 1].
template <class T>
math::SoftRowSums<T> sums_of(const SoftRows<T>& r, int64_t row, void* grad, T* tops, SoftChunk<T>& k, bool& bad) {
  SoftPiece piece{-math::infinity<double>, 0, 0, 0, 0, 0, 0};
  look_at_target(r, row, k);
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from);
    bad |= r.targets(row, from, n, k);
    const T* u = r.logits(row, from, n, k);
    const T here = largest(u, n), before = static_cast<T>(piece.top);
    if (here > before) raise(static_cast<double>(here), static_cast<double>(math::exp(before - here)), piece);
    const T top = static_cast<T>(piece.top);
    if (tops != nullptr) tops[from / chunk] = top;
    T* e = r.place(grad, row, from, k);
    // Relative to zero as long as every class was masked: inf - inf would be NaN.
    exponentials(u, n, top > -math::infinity<T> ? top : T(0), k.below, e);
    for (int64_t i = n; i < padded(n); ++i) k.below[i] = -math::infinity<T>;
    if (r.p.divergence)
      for (int64_t i = 0; i < n; ++i) k.below[i] -= math::log_of_target(k.t[i]);
    piece.total += static_cast<double>(sum(e, n));
    add_targets(r, from, n, k, piece);
  }
  return {static_cast<T>(piece.top),  static_cast<T>(piece.total), static_cast<T>(piece.mass),
          static_cast<T>(piece.dot),  static_cast<T>(piece.live),  static_cast<T>(piece.live_weight),
          static_cast<T>(piece.gap)};
}

// The targets that the slopes hold: smoothed, and times the class weights.
template <class T>
const T* weighed_targets(const SoftRows<T>& r, int64_t row, int64_t from, int64_t n, T share, SoftChunk<T>& k) {
  const T* w = r.class_weight == nullptr ? nullptr : r.class_weight + from;
  if (w == nullptr && r.smoothing == 0 && r.target_scale == 0)
    return in_place(r.p.target, r.p.target_type, row * r.p.classes + from, n, k.t);
  r.targets(row, from, n, k);
  if (r.smoothing != 0) {
    const T* u = r.logits(row, from, n, k);
    const T hard = 1 - r.smoothing;
    for (int64_t i = 0; i < n; ++i) k.t[i] = hard * k.t[i] + (u[i] > -math::infinity<T> ? share : T(0));
  }
  if (w != nullptr)
    for (int64_t i = 0; i < n; ++i) k.t[i] *= w[i];
  return k.t;
}

// The exponentials in g become gradients. What would become subnormal is zero: such products are slow, and nothing
// beside a row's largest slope.
template <class T>
void slopes_in_chunk(const T* __restrict t, const T* __restrict multiplicative, int64_t n, T exponent, T factor,
                     T* __restrict g) {
  const T product = exponent * factor;
  const T least = std::numeric_limits<T>::min() / (product < 0 ? -product : product);
  for (int64_t i = 0; i < n; ++i) g[i] = ((g[i] < least ? T(0) : g[i]) * exponent - t[i]) * factor;
  if (multiplicative != nullptr)
    for (int64_t i = 0; i < n; ++i) g[i] *= multiplicative[i];
}

// From the exponentials that stand in their places relative to `tops`, or (null) from the logits.
template <class T>
void write_row(const SoftRows<T>& r, int64_t row, const SoftRowSlopes<T>& s, T factor, const T* tops, void* grad,
               SoftChunk<T>& k) {
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from);
    T *g = r.place(grad, row, from, k), exponent = s.exponent;
    if (tops == nullptr) {
      if (r.margin != nullptr) r.targets(row, from, n, k);
      exponentials(r.logits(row, from, n, k), n, s.top, k.below, g);
    } else if (tops[from / chunk] != s.top) {
      exponent *= math::exp(tops[from / chunk] - s.top);
    }
    const T* t = weighed_targets(r, row, from, n, s.share, k);
    const T* by_class = r.multiplicative == nullptr ? nullptr : r.multiplicative + from;
    slopes_in_chunk(t, by_class, n, exponent, factor * r.scale, g);
    r.write(g, row, from, n, grad, k);
  }
}

template <class T>
void write_zeros(const SoftRows<T>& r, int64_t row, void* grad, SoftChunk<T>& k) {
  for (int64_t i = 0; i < chunk; ++i) k.e[i] = 0;
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from);
    r.write(k.e, row, from, n, grad, k);
  }
}

template <class T>
void keep_state(const SoftRowSlopes<T>& s, const TargetSoftmax<T>& of_target, T* state) {
  state[0] = s.top;
  state[1] = s.exponent;
  state[2] = s.share;
  state[3] = of_target.top;
  state[4] = of_target.factor;
}

bool rows(const SoftRowProblem& p, int64_t begin, int64_t end, const void* weight, double scale, void* losses,
          void* state, void* grad) {
  return with_soft_rows(p, [&]<class T>(const SoftRows<T>& r) {
    const T* w = static_cast<const T*>(weight);
    const bool keeps = p.classes <= chunk || (r.direct() && p.classes <= soft_row_kept);
    SoftChunk<T> k;
    k.of_target = {};
    T at_tops[soft_row_kept / chunk], *tops = keeps ? at_tops : nullptr;
    bool bad = false;
    for (int64_t row = begin; row < end; ++row) {
      const bool counts = row_counts(p, row);
      SoftRowSlopes<T> s{};
      if (counts) s = math::soft_row_slopes(sums_of(r, row, grad, tops, k, bad), r.smoothing);
      static_cast<T*>(losses)[row] = s.loss;
      if (state != nullptr) keep_state(s, k.of_target, static_cast<T*>(state) + row * soft_row_state);
      if (grad == nullptr) continue;
      if (counts) {
        write_row(r, row, s, static_cast<T>(scale) * (w == nullptr ? T(1) : w[row]), tops, grad, k);
      } else {
        write_zeros(r, row, grad, k);
      }
    }
    return bad;
  });
}

void backward(const SoftRowProblem& p, int64_t begin, int64_t end, const void* state, const void* by_row, void* grad) {
  with_soft_rows(p, [&]<class T>(const SoftRows<T>& r) {
    SoftChunk<T> k;
    const T* const nowhere = nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const T* its = static_cast<const T*>(state) + row * soft_row_state;
      if (row_counts(p, row)) {
        const SoftRowSlopes<T> s = {0, its[0], its[1], its[2]};
        k.of_target = {its[3], its[4]};
        write_row(r, row, s, static_cast<const T*>(by_row)[row], nowhere, grad, k);
      } else {
        write_zeros(r, row, grad, k);
      }
    }
  });
}

}  // namespace

const SoftRowTable soft_row_table = {rows, backward};

}  // namespace counterpoise::CP_ARCH

// Row-wise family: a row is read once, in chunks of adjusted logits whose exponentials are taken relative to the largest
// logit so far. Where the gradient is wanted with the loss, the exponentials are kept (in the gradient's own memory where
// the type allows it) and scaled in a second pass, while the row is still in the cache.
#include "../rows.h"

#include "../../math/rows.h"
#include "few_classes.h"
#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

using math::RowKind;
using math::RowParameters;
using math::RowSlopes;
using math::RowSums;

inline int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// Adjusted logits of one chunk with those of the target, masked classes and the padding at -infinity, and e_c.
template <class T>
struct Chunk {
  alignas(64) T u[row_chunk], e[row_chunk];
  int64_t row = -1, from = -1;
};

// (z * multiplicative + additive) * scale of classes [from, from + n).
template <class T>
using Reader = void (*)(const RowProblem&, int64_t row, int64_t from, int64_t n, T* u);

template <class S, bool Multiply, bool Add, class T>
void read(const RowProblem& p, int64_t row, int64_t from, int64_t n, T* __restrict u) {
  const S* __restrict z = static_cast<const S*>(p.logits) + row * p.classes + from;
  const T* __restrict d = static_cast<const T*>(p.multiplicative) + (Multiply ? from : 0);
  const T* __restrict a = static_cast<const T*>(p.additive) + (Add ? from : 0);
  const T scale = static_cast<T>(p.scale);
  for (int64_t i = 0; i < n; ++i) {
    T x = widen(z[i]);
    if constexpr (Multiply) x *= d[i];
    if constexpr (Add) x += a[i];
    u[i] = x * scale;
  }
}

// Gradients of n classes, in the logits' type.
template <class T>
using Writer = void (*)(const T* g, int64_t n, void* grad, int64_t at);

template <class S, class T>
void write(const T* __restrict g, int64_t n, void* grad, int64_t at) {
  S* __restrict to = static_cast<S*>(grad) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = Narrow<S>::from(g[i]);
}

template <class S, class T>
void write_past_caches(const T* __restrict g, int64_t n, void* grad, int64_t at) {
  alignas(64) S narrow[row_chunk];
  store(g, n, narrow);
  stream(narrow, n, static_cast<S*>(grad) + at);
}

// A problem with its functions and numbers at hand.
template <class T>
struct Rows {
  const RowProblem& p;
  Reader<T> read;
  Writer<T> write;
  Gather<T> gather;
  Scatter<T> scatter;
  RowParameters<T> c;
  const T *multiplicative, *margin, *class_weight;

  bool long_rows() const { return p.classes > row_chunk; }
  bool has_off() const { return c.kind == RowKind::asymmetric && c.smoothing != 0; }
  int64_t length(int64_t from, int64_t to) const { return to - from < row_chunk ? to - from : row_chunk; }

  void fill(int64_t row, int64_t from, int64_t n, Chunk<T>& k) const {
    if (k.row == row && k.from == from) return;
    read(p, row, from, n, k.u);
    for (int64_t i = n; i < padded(n); ++i) k.u[i] = -math::infinity<T>;
    const int64_t y = p.target[row] - from;
    if (y >= 0 && y < n) k.u[y] = -math::infinity<T>;
    k.row = row;
    k.from = from;
  }

  T target(int64_t row) const {
    T u;
    const int64_t y = p.target[row];
    read(p, row, y, 1, &u);
    return margin == nullptr ? u : u - margin[y] * static_cast<T>(p.scale);
  }

  T target_weight(int64_t row) const { return class_weight == nullptr ? T(1) : class_weight[p.target[row]]; }
};

template <class T, class S>
Rows<T> rows_with(const RowProblem& p) {
  const Reader<T> readers[] = {read<S, false, false, T>, read<S, false, true, T>, read<S, true, false, T>,
                               read<S, true, true, T>};
  const RowParameters<T> c = {static_cast<RowKind>(p.kind), math::exponent<T>(p.gamma_pos),
                              math::exponent<T>(p.gamma_neg), static_cast<T>(p.smoothing), p.detach};
  return {p,
          readers[2 * (p.multiplicative != nullptr) + (p.additive != nullptr)],
          row_streams(p) ? write_past_caches<S, T> : write<S, T>,
          gather<S, T>,
          scatter<S, T>,
          c,
          static_cast<const T*>(p.multiplicative),
          static_cast<const T*>(p.margin),
          static_cast<const T*>(p.class_weight)};
}

// Calls f with the problem in the type that it is computed in.
template <class F>
auto with_rows(const RowProblem& p, F&& f) {
  switch (p.logits_type) {
    case Type::float64: return f(rows_with<double, double>(p));
    case Type::bfloat16: return f(rows_with<float, bfloat16>(p));
    case Type::float16: return f(rows_with<float, _Float16>(p));
    default: return f(rows_with<float, float>(p));
  }
}

// Number, weights and gaps below the top of the classes in a chunk that are not masked.
template <class T>
void add_labels(const Rows<T>& r, int64_t from, int64_t n, T top, const Chunk<T>& k, RowPiece& piece) {
  using V = typename Wide<T>::type;
  const T* w = r.class_weight == nullptr ? nullptr : r.class_weight + from;
  const bool weigh_gap = r.c.kind == RowKind::cross_entropy;
  V live = {}, weight = {}, gap = {};
  const V ones = live + T(1), zeros = {};
  for (int64_t i = 0; i < padded(n); i += Wide<T>::width) {
    V u, each = ones;
    __builtin_memcpy(&u, k.u + i, sizeof(u));
    if (w != nullptr && i < n) __builtin_memcpy(&each, w + i, least(n - i, Wide<T>::width) * sizeof(T));
    const auto here = u > -math::infinity<T>;
    live += here ? ones : zeros;
    weight += here ? each : zeros;
    gap += here ? (weigh_gap ? each : ones) * (u - top) : zeros;
  }
  for (int64_t lane = 0; lane < Wide<T>::width; ++lane) {
    piece.live += live[lane];
    piece.live_weight += weight[lane];
    piece.gap += gap[lane];
  }
}

template <class T>
void exponentials(const T* __restrict u, int64_t n, T top, T* __restrict e) {
  for (int64_t i = 0; i < n; ++i) e[i] = math::exp_of_negative(u[i] - top);
}

// Raises the top of what has been added up so far.
template <class T>
void raise(const Rows<T>& r, double top, RowPiece& piece) {
  if (piece.others > 0) piece.others *= static_cast<double>(math::exp(static_cast<T>(piece.top - top)));
  if (piece.live > 0)
    piece.gap += (r.c.kind == RowKind::cross_entropy ? piece.live_weight : piece.live) * (piece.top - top);
  piece.top = top;
}

// The exponentials go to `keep` (null = nowhere; a row of one chunk has them in it), and to `tops` what each chunk's are
// relative to.
template <class T>
RowPiece sums_of(const Rows<T>& r, int64_t row, int64_t from, int64_t to, T target, T* keep, T* tops, Chunk<T>& k) {
  RowPiece piece{static_cast<double>(target), 0, 0, 0, 0, 0, 0};
  for (int64_t n; from < to; from += n) {
    n = r.length(from, to);
    r.fill(row, from, n, k);
    const double here = static_cast<double>(largest(k.u, padded(n)));
    if (here > piece.top) raise(r, here, piece);
    const T top = static_cast<T>(piece.top);
    exponentials(k.u, padded(n), top == -math::infinity<T> ? T(0) : top, k.e);
    piece.others += static_cast<double>(sum(k.e, padded(n)));
    if (r.c.smoothing != 0) add_labels(r, from, n, top, k, piece);
    if (tops != nullptr) tops[from / row_chunk] = top;
    if (keep != nullptr) store(k.e, n, keep + from);
  }
  return piece;
}

// Values and slopes of fading_other over a chunk; 0 at the target, masked classes and the padding.
template <class T>
void fade_chunk(const Rows<T>& r, int64_t n, T shift, const Chunk<T>& k, T* __restrict value, T* __restrict slope) {
  for (int64_t i = 0; i < n; ++i) {
    const bool live = k.u[i] > -math::infinity<T>;
    const T log_p = live ? k.u[i] - shift : T(-1);
    T v, s;
    math::fading_other(log_p, r.c.gamma_neg.value, r.c.detach, v, s);
    value[i] = live ? v : T(0);
    slope[i] = live ? s : T(0);
  }
}

template <class T>
void add_off(const Rows<T>& r, int64_t row, int64_t from, int64_t to, T shift, RowPiece& piece, Chunk<T>& k) {
  alignas(64) T value[row_chunk], slope[row_chunk];
  for (int64_t n; from < to; from += n) {
    n = r.length(from, to);
    r.fill(row, from, n, k);
    fade_chunk(r, padded(n), shift, k, value, slope);
    piece.off_value += static_cast<double>(sum(value, padded(n)));
    piece.off_slope += static_cast<double>(sum(slope, padded(n)));
  }
}

template <class T>
RowSums<T> sums_with(const Rows<T>& r, int64_t row, T target, const RowPiece& s) {
  const T top = static_cast<T>(s.top);
  return {top,
          static_cast<T>(s.others),
          target - top,
          r.target_weight(row),
          static_cast<T>(s.live),
          static_cast<T>(s.live_weight),
          static_cast<T>(s.gap),
          static_cast<T>(s.off_value),
          static_cast<T>(s.off_slope)};
}

template <class T>
void keep_state(const RowSlopes<T>& s, T* state) {
  if (state == nullptr) return;
  const T numbers[row_state] = {s.top, s.log_total, s.exponent, s.label, s.target};
  for (int64_t i = 0; i < row_state; ++i) state[i] = numbers[i];
}

template <class T>
RowSlopes<T> slopes_from(const T* state) {
  return {0, state[0], state[1], state[2], state[3], state[4]};
}

// The exponentials in k.e become gradients.
template <class T>
void slopes_in_chunk(const Rows<T>& r, int64_t row, int64_t from, int64_t n, const RowSlopes<T>& s, T factor,
                     Chunk<T>& k) {
  factor *= static_cast<T>(r.p.scale);
  const T exponent = s.exponent * factor, label = s.label * factor;
  const T least = least_for(exponent);
  for (int64_t i = 0; i < n; ++i) k.e[i] = times(k.e[i], exponent, least);
  if (r.has_off()) {
    alignas(64) T value[row_chunk], slope[row_chunk];
    r.fill(row, from, n, k);
    fade_chunk(r, padded(n), s.top + s.log_total, k, value, slope);
    const T least_slope = least_for(label);
    for (int64_t i = 0; i < n; ++i) k.e[i] += times(slope[i], label, least_slope);
  } else if (r.c.smoothing != 0) {
    const bool weighted = r.c.kind == RowKind::cross_entropy && r.class_weight != nullptr;
    r.fill(row, from, n, k);
    for (int64_t i = 0; i < n; ++i)
      k.e[i] += k.u[i] > -math::infinity<T> ? label * (weighted ? r.class_weight[from + i] : T(1)) : T(0);
  }
  const int64_t y = r.p.target[row] - from;
  if (y >= 0 && y < n) k.e[y] = s.target * factor;
  if (r.multiplicative != nullptr)
    for (int64_t i = 0; i < n; ++i) k.e[i] *= r.multiplicative[from + i];
}

// From the exponentials that `kept` holds, or that a row of one chunk has in it.
template <class T>
void write_row(const Rows<T>& r, int64_t row, const RowSlopes<T>& s, T factor, const T* kept, const T* tops, void* grad,
               Chunk<T>& k) {
  for (int64_t from = 0, n; from < r.p.classes; from += n) {
    n = r.length(from, r.p.classes);
    if (r.long_rows()) load(kept + from, n, k.e);
    RowSlopes<T> here = s;
    const T top = tops[from / row_chunk];
    if (top != s.top) here.exponent *= math::exp(top - s.top);
    slopes_in_chunk(r, row, from, n, here, factor, k);
    r.write(k.e, n, grad, row * r.p.classes + from);
  }
}

template <class T>
void write_zeros(const Rows<T>& r, int64_t row, int64_t from, int64_t to, void* grad, Chunk<T>& k) {
  for (int64_t i = 0; i < row_chunk && i < to - from; ++i) k.e[i] = 0;
  for (int64_t n; from < to; from += n) {
    n = r.length(from, to);
    r.write(k.e, n, grad, row * r.p.classes + from);
  }
}

template <class T>
RowSlopes<T> row_of(const Rows<T>& r, int64_t row, T* kept, T* tops, Chunk<T>& k) {
  const T target = r.target(row);
  RowPiece piece = sums_of(r, row, 0, r.p.classes, target, r.long_rows() ? kept : nullptr, tops, k);
  RowSums<T> s = sums_with(r, row, target, piece);
  if (r.has_off()) {
    add_off(r, row, 0, r.p.classes, s.top + math::row_terms(s, r.c.smoothing).log_total, piece, k);
    s = sums_with(r, row, target, piece);
  }
  return math::row_slopes(s, r.c);
}

template <class T>
void write_piece(const Rows<T>& r, int64_t row, int64_t from, int64_t to, const RowSlopes<T>& s, T factor, void* grad,
                 Chunk<T>& k) {
  if (!row_counts(r.p, row)) return write_zeros(r, row, from, to, grad, k);
  for (int64_t n; from < to; from += n) {
    n = r.length(from, to);
    r.fill(row, from, n, k);
    exponentials(k.u, padded(n), s.top, k.e);
    slopes_in_chunk(r, row, from, n, s, factor, k);
    r.write(k.e, n, grad, row * r.p.classes + from);
  }
}

void rows(const RowProblem& p, int64_t begin, int64_t end, const void* weight, double scale, void* losses, void* state,
          void* scratch, void* grad) {
  with_rows(p, [&]<class T>(const Rows<T>& r) {
    const T* w = static_cast<const T*>(weight);
    if (p.classes <= few_classes && !r.has_off()) {
      RowsInLanes<T> side_by_side(p, r.c, r.gather, r.scatter);
      side_by_side.run(begin, end, w, static_cast<T>(scale), static_cast<T*>(losses), static_cast<T*>(state), grad);
      return;
    }
    const bool keeps = grad != nullptr && p.classes <= row_kept;
    Chunk<T> k;
    T tops[row_kept / row_chunk];
    for (int64_t row = begin; row < end; ++row) {
      T* its_state = state == nullptr ? nullptr : static_cast<T*>(state) + row * row_state;
      if (!row_counts(p, row)) {
        static_cast<T*>(losses)[row] = 0;
        keep_state(RowSlopes<T>{}, its_state);
        if (grad != nullptr) write_zeros(r, row, 0, p.classes, grad, k);
        continue;
      }
      T* kept = scratch != nullptr ? static_cast<T*>(scratch) : static_cast<T*>(grad) + row * p.classes;
      const RowSlopes<T> s = row_of(r, row, keeps ? kept : nullptr, keeps ? tops : nullptr, k);
      static_cast<T*>(losses)[row] = s.loss;
      keep_state(s, its_state);
      if (grad == nullptr) continue;
      const T factor = static_cast<T>(scale) * (w == nullptr ? T(1) : w[row]);
      if (keeps) {
        write_row(r, row, s, factor, kept, tops, grad, k);
      } else {
        write_piece(r, row, 0, p.classes, s, factor, grad, k);
      }
    }
  });
  end_of_stream();
}

void backward(const RowProblem& p, int64_t begin, int64_t end, const void* state, const void* by_row, void* grad) {
  with_rows(p, [&]<class T>(const Rows<T>& r) {
    Chunk<T> k;
    for (int64_t row = begin; row < end; ++row)
      write_piece(r, row, 0, p.classes, slopes_from(static_cast<const T*>(state) + row * row_state),
                  static_cast<const T*>(by_row)[row], grad, k);
  });
  end_of_stream();
}

RowPiece sums(const RowProblem& p, int64_t row, int64_t from, int64_t to) {
  return with_rows(p, [&]<class T>(const Rows<T>& r) {
    Chunk<T> k;
    T* const nowhere = nullptr;
    return sums_of(r, row, from, to, r.target(row), nowhere, nowhere, k);
  });
}

double log_total(const RowProblem& p, int64_t row, const RowPiece& of_row) {
  return with_rows(p, [&]<class T>(const Rows<T>& r) -> double {
    return math::row_terms(sums_with(r, row, r.target(row), of_row), r.c.smoothing).log_total;
  });
}

void off(const RowProblem& p, int64_t row, int64_t from, int64_t to, double shift, RowPiece& piece) {
  with_rows(p, [&]<class T>(const Rows<T>& r) {
    Chunk<T> k;
    if (r.has_off()) add_off(r, row, from, to, static_cast<T>(shift), piece, k);
  });
}

void outcome(const RowProblem& p, int64_t row, const RowPiece& of_row, void* losses, void* state) {
  with_rows(p, [&]<class T>(const Rows<T>& r) {
    const RowSlopes<T> s = math::row_slopes(sums_with(r, row, r.target(row), of_row), r.c);
    static_cast<T*>(losses)[row] = s.loss;
    keep_state(s, static_cast<T*>(state) + row * row_state);
  });
}

void slopes(const RowProblem& p, int64_t row, int64_t from, int64_t to, const void* state, double factor, void* grad) {
  with_rows(p, [&]<class T>(const Rows<T>& r) {
    Chunk<T> k;
    write_piece(r, row, from, to, slopes_from(static_cast<const T*>(state) + row * row_state), static_cast<T>(factor),
                grad, k);
  });
}

}  // namespace

const RowTable row_table = {rows, backward, sums, log_total, off, outcome, slopes};

}  // namespace counterpoise::CP_ARCH

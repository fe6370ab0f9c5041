// Element-wise family: chunks of entries are read into buffers, computed, and summed or written.
#include "../binary.h"

#include "../../math/binary.h"
#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

using math::BinaryKind;
using math::BinaryParameters;

template <class T>
struct Chunk {
  alignas(64) T z[binary_chunk], t[binary_chunk], value[binary_chunk], slope[binary_chunk];
  alignas(64) uint8_t live[binary_chunk];
};

template <class T>
BinaryParameters<T> parameters(const BinaryProblem& p) {
  return {math::exponent<T>(p.gamma_pos), math::exponent<T>(p.gamma_neg),
          static_cast<T>(p.alpha_pos),    static_cast<T>(p.alpha_neg),
          static_cast<T>(p.margin),       static_cast<T>(p.log_eps),
          static_cast<T>(p.beta),         p.detach};
}

template <BinaryKind Kind, bool Whole, bool Margin, class T>
void hard(int64_t n, const BinaryParameters<T>& c, Chunk<T>& k) {
  for (int64_t i = 0; i < n; ++i) {
    const auto out = math::binary_hard<Kind, Whole, Margin>(k.z[i], k.t[i], c);
    k.value[i] = out.value;
    k.slope[i] = out.slope;
  }
}

// Over what hard() wrote.
template <BinaryKind Kind, class T>
void soft(int64_t n, const BinaryParameters<T>& c, Chunk<T>& k) {
  for (int64_t i = 0; i < n; ++i) {
    const auto out = math::binary_soft<Kind>(k.z[i], k.t[i], c);
    const bool between = k.t[i] > 0 && k.t[i] < 1;
    k.value[i] = between ? out.value : k.value[i];
    k.slope[i] = between ? out.slope : k.slope[i];
  }
}

template <class T>
using Formula = void (*)(int64_t, const BinaryParameters<T>&, Chunk<T>&);

template <class T>
struct Formulas {
  BinaryParameters<T> c;
  Formula<T> hard, soft;
};

template <class T>
Formulas<T> formulas(const BinaryProblem& p) {
  const auto c = parameters<T>(p);
  const bool whole = c.gamma_pos.whole >= 0 && c.gamma_neg.whole >= 0;
  switch (static_cast<BinaryKind>(p.kind)) {
    case BinaryKind::focal_star:
      return {c, hard<BinaryKind::focal_star, true, false, T>, soft<BinaryKind::focal_star, T>};
    case BinaryKind::asymmetric: {
      const Formula<T> forms[] = {hard<BinaryKind::asymmetric, false, false, T>,
                                  hard<BinaryKind::asymmetric, false, true, T>,
                                  hard<BinaryKind::asymmetric, true, false, T>,
                                  hard<BinaryKind::asymmetric, true, true, T>};
      return {c, forms[2 * whole + (c.margin > 0)], soft<BinaryKind::asymmetric, T>};
    }
    default:
      return {c, whole ? hard<BinaryKind::focal, true, false, T> : hard<BinaryKind::focal, false, false, T>,
              soft<BinaryKind::focal, T>};
  }
}

struct Labels {
  bool bad, soft, masked_class;
};

// Which labels there are, and which entries are alive: not masked, and not a masked class's.
template <class T>
Labels inspect(int64_t n, const uint8_t* mask, bool mask_by_entry, int64_t row, int64_t at, Chunk<T>& k) {
  if (mask == nullptr) {
    for (int64_t i = 0; i < n; ++i) k.live[i] = 1;
  } else if (mask_by_entry) {
    for (int64_t i = 0; i < n; ++i) k.live[i] = mask[at + i] != 0;
  } else {
    for (int64_t i = 0; i < n; ++i) k.live[i] = mask[(at + i) / row] != 0;
  }
  int bad = 0, between = 0, gone = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int live = k.live[i];
    const int dead = (k.z[i] == -math::infinity<T>)&(k.t[i] == 0);
    bad |= live & !((k.t[i] >= 0) & (k.t[i] <= 1));
    between |= live & (k.t[i] > 0) & (k.t[i] < 1);
    gone |= live & dead;
  }
  return {bad != 0, between != 0, gone != 0};
}

template <class T>
void drop_dead(int64_t n, Chunk<T>& k) {
  for (int64_t i = 0; i < n; ++i) {
    const bool live = k.live[i] && !(k.z[i] == -math::infinity<T> && k.t[i] == 0);
    k.live[i] = live;
    k.z[i] = live ? k.z[i] : T(0);
    k.t[i] = live ? k.t[i] : T(0);
  }
}

template <class T>
Labels read(const BinaryProblem& p, int64_t at, int64_t n, Chunk<T>& k) {
  with_float_type(p.logits_type, [&](auto* s) { load(static_cast<decltype(s)>(p.logits) + at, n, k.z); });
  with_type(p.target_type, [&](auto* s) { load(static_cast<decltype(s)>(p.target) + at, n, k.t); });
  return inspect(n, p.mask, p.mask_by_entry, p.row, at, k);
}

// How many entries of a row count.
template <class T>
int64_t count_row(const BinaryProblem& p, int64_t row, Chunk<T>& k) {
  int64_t count = 0;
  for (int64_t j = 0; j < p.row; j += binary_chunk) {
    const int64_t n = p.row - j < binary_chunk ? p.row - j : binary_chunk;
    read(p, row * p.row + j, n, k);
    drop_dead(n, k);
    for (int64_t i = 0; i < n; ++i) count += k.live[i];
  }
  return count;
}

// Value and slope of entries [at, at + n), weighted by class; those that do not count are 0.
template <class T>
Labels compute(const BinaryProblem& p, const Formulas<T>& f, int64_t at, int64_t n, int64_t in_row, Chunk<T>& k) {
  const Labels labels = read(p, at, n, k);
  const bool some_dead = p.mask != nullptr || labels.masked_class;
  if (some_dead) drop_dead(n, k);
  f.hard(n, f.c, k);
  if (labels.soft) f.soft(n, f.c, k);
  if (p.entry_weight != nullptr) {
    const T* w = static_cast<const T*>(p.entry_weight) + in_row;
    for (int64_t i = 0; i < n; ++i) {
      k.value[i] *= w[i];
      k.slope[i] *= w[i];
    }
  }
  if (some_dead) {
    for (int64_t i = 0; i < n; ++i) {
      k.value[i] = k.live[i] ? k.value[i] : T(0);
      k.slope[i] = k.live[i] ? k.slope[i] : T(0);
    }
  }
  return labels;
}

// visit(first entry, entries, first entry within its row) for the chunks of rows [begin, end).
template <class F>
void for_chunks(int64_t row, int64_t begin, int64_t end, F&& visit) {
  if (row == 0) return;
  const int64_t together = rows_a_chunk(row);
  if (row < binary_chunk) {
    for (int64_t r = begin; r < end; r += together)
      visit(r * row, (end - r < together ? end - r : together) * row, int64_t(0));
    return;
  }
  for (int64_t r = begin; r < end; ++r)
    for (int64_t j = 0; j < row; j += binary_chunk)
      visit(r * row + j, row - j < binary_chunk ? row - j : binary_chunk, j);
}

void note(const Labels& labels, BinarySeen& seen) {
  seen.bad_target |= labels.bad;
  seen.masked_class |= labels.masked_class;
}

template <class T>
void write(const BinaryProblem& p, const Chunk<T>& k, int64_t at, int64_t n, void* grad) {
  with_float_type(p.logits_type, [&](auto* s) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
    store(k.slope, n, static_cast<S*>(grad) + at);
  });
}

template <class T>
double flat_of(const BinaryProblem& p, int64_t begin, int64_t end, double scale, void* grad, BinarySeen& seen) {
  const auto f = formulas<T>(p);
  const T factor = static_cast<T>(scale);
  Chunk<T> k;
  double total = 0;
  for_chunks(p.row, begin, end, [&](int64_t at, int64_t n, int64_t in_row) {
    note(compute(p, f, at, n, in_row, k), seen);
    total += static_cast<double>(sum(k.value, n));
    if (grad == nullptr) return;
    for (int64_t i = 0; i < n; ++i) k.slope[i] *= factor;
    write(p, k, at, n, grad);
  });
  return total;
}

template <class T>
void rows_of(const BinaryProblem& p, int64_t begin, int64_t end, void* sums, void* counts, BinarySeen& seen) {
  const auto f = formulas<T>(p);
  T *s = static_cast<T*>(sums), *c = static_cast<T*>(counts);
  Chunk<T> k;
  for (int64_t r = begin; r < end; ++r) s[r] = c[r] = 0;
  for_chunks(p.row, begin, end, [&](int64_t at, int64_t n, int64_t in_row) {
    note(compute(p, f, at, n, in_row, k), seen);
    const int64_t length = p.row < binary_chunk ? p.row : n;
    for (int64_t j = 0; j < n; j += length) {
      int64_t count = 0;
      for (int64_t i = 0; i < length; ++i) count += k.live[j + i];
      s[(at + j) / p.row] += sum(k.value + j, length);
      c[(at + j) / p.row] += static_cast<T>(count);
    }
  });
}

template <class T>
void grad_of(const BinaryProblem& p, int64_t begin, int64_t end, const void* by_row, double scale, bool mean,
             void* grad) {
  const auto f = formulas<T>(p);
  const T* g = static_cast<const T*>(by_row);
  Chunk<T> k;
  // Rows that are no longer than a chunk are counted in it; the counts of longer ones need a pass of their own.
  const bool within = p.row < binary_chunk;
  int64_t counted_row = -1, count = 0;
  for_chunks(p.row, begin, end, [&](int64_t at, int64_t n, int64_t in_row) {
    if (mean && !within && at / p.row != counted_row) {
      counted_row = at / p.row;
      count = count_row(p, counted_row, k);
    }
    compute(p, f, at, n, in_row, k);
    const int64_t length = within ? p.row : n;
    for (int64_t j = 0; j < n; j += length) {
      if (mean && within) {
        count = 0;
        for (int64_t i = 0; i < length; ++i) count += k.live[j + i];
      }
      T factor = static_cast<T>(scale) * (g == nullptr ? T(1) : g[(at + j) / p.row]);
      if (mean) factor = factor / static_cast<T>(count > 0 ? count : 1);
      for (int64_t i = 0; i < length; ++i) k.slope[j + i] = k.live[j + i] ? k.slope[j + i] * factor : T(0);
    }
    write(p, k, at, n, grad);
  });
}

double flat(const BinaryProblem& p, int64_t begin, int64_t end, double scale, void* grad, BinarySeen& seen) {
  return p.logits_type == Type::float64 ? flat_of<double>(p, begin, end, scale, grad, seen)
                                        : flat_of<float>(p, begin, end, scale, grad, seen);
}

void rows(const BinaryProblem& p, int64_t begin, int64_t end, void* sums, void* counts, BinarySeen& seen) {
  p.logits_type == Type::float64 ? rows_of<double>(p, begin, end, sums, counts, seen)
                                 : rows_of<float>(p, begin, end, sums, counts, seen);
}

void grad(const BinaryProblem& p, int64_t begin, int64_t end, const void* by_row, double scale, bool mean, void* out) {
  p.logits_type == Type::float64 ? grad_of<double>(p, begin, end, by_row, scale, mean, out)
                                 : grad_of<float>(p, begin, end, by_row, scale, mean, out);
}

}  // namespace

const BinaryTable binary_table = {flat, rows, grad};

}  // namespace counterpoise::CP_ARCH

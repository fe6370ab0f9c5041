// Element-wise family: chunks of entries are read into buffers, computed, and summed or written.
#include "../binary.h"

#include "../../math/binary.h"
#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

using math::BinaryKind;
using math::BinaryParameters;

// Logits and labels are read where they lie if their type is the one that is computed in, else through a buffer.
template <class T>
struct Chunk {
  const T *z, *t;
  alignas(64) T z_buffer[binary_chunk], t_buffer[binary_chunk], value[binary_chunk], slope[binary_chunk];
  alignas(64) T weight[binary_chunk];
  alignas(64) uint8_t live[binary_chunk];
};

template <class T>
BinaryParameters<T> parameters(const BinaryProblem& p) {
  return {math::exponent<T>(p.gamma_pos), math::exponent<T>(p.gamma_neg),
          static_cast<T>(p.alpha_pos),    static_cast<T>(p.alpha_neg),
          static_cast<T>(p.margin),       static_cast<T>(p.log_eps),
          static_cast<T>(p.beta),         p.detach};
}

template <BinaryKind Kind, int P, int N, bool Margin, class T>
void hard(int64_t n, const BinaryParameters<T>& parameters, Chunk<T>& k) {
  const BinaryParameters<T> c = parameters;
  const T* __restrict z = k.z;
  const T* __restrict t = k.t;
  T* __restrict value = k.value;
  T* __restrict slope = k.slope;
  for (int64_t i = 0; i < n; ++i) {
    const auto out = math::binary_hard<Kind, P, N, Margin, false>(z[i], t[i], c);
    value[i] = out.value;
    slope[i] = out.slope;
  }
}

// The whole work on a chunk of finite logits whose labels are all 0 or 1, without a buffer. `odd` says that this was not
// so, and that what was done is void.
template <BinaryKind Kind, int P, int N, bool Margin, bool Grad, class T>
T straight(int64_t n, const T* __restrict z, const T* __restrict t, const BinaryParameters<T>& parameters, T factor,
           T* __restrict grad, bool& odd) {
  const BinaryParameters<T> c = parameters;
  T total = 0;
  Bits<T> flags = 0;
#pragma omp simd reduction(+ : total) reduction(| : flags)
  for (int64_t i = 0; i < n; ++i) {
    const auto out = math::binary_hard<Kind, P, N, Margin, true>(z[i], t[i], c);
    total += out.value;
    if constexpr (Grad) grad[i] = out.slope * factor;
    flags |= (bits(t[i]) ^ bits(t[i] > 0 ? T(1) : T(0))) | bits(z[i] - z[i]);
  }
  odd = flags != 0;
  return total;
}

// Over what hard() wrote.
template <BinaryKind Kind, int P, class T>
void soft(int64_t n, const BinaryParameters<T>& c, Chunk<T>& k) {
  for (int64_t i = 0; i < n; ++i) {
    const auto out = math::binary_soft<Kind, P>(k.z[i], k.t[i], c);
    const bool between = k.t[i] > 0 && k.t[i] < 1;
    k.value[i] = between ? out.value : k.value[i];
    k.slope[i] = between ? out.slope : k.slope[i];
  }
}

template <class T>
using Formula = void (*)(int64_t, const BinaryParameters<T>&, Chunk<T>&);
template <class T>
using Straight = T (*)(int64_t, const T*, const T*, const BinaryParameters<T>&, T, T*, bool&);

template <class T>
struct Formulas {
  BinaryParameters<T> c;
  Formula<T> hard, soft;
  Straight<T> value, value_and_slope;
};

template <BinaryKind Kind, int P, int N, bool Margin, class T>
Formulas<T> formulas(const BinaryParameters<T>& c) {
  return {c, hard<Kind, P, N, Margin, T>, soft<Kind, P, T>, straight<Kind, P, N, Margin, false, T>,
          straight<Kind, P, N, Margin, true, T>};
}

// The released settings have code of their own, all others what their exponents allow.
template <bool Margin, class T>
Formulas<T> asymmetric_formulas(const BinaryParameters<T>& c) {
  constexpr BinaryKind kind = BinaryKind::asymmetric;
  constexpr int any = math::any_power, whole = math::whole_power;
  if (c.gamma_neg.whole == 4 && c.gamma_pos.whole == 0) return formulas<kind, 0, 4, Margin>(c);
  if (c.gamma_neg.whole == 4 && c.gamma_pos.whole == 1) return formulas<kind, 1, 4, Margin>(c);
  if (c.gamma_neg.whole >= 0 && c.gamma_pos.whole >= 0) return formulas<kind, whole, whole, Margin>(c);
  return formulas<kind, any, any, Margin>(c);
}

template <class T>
Formulas<T> formulas(const BinaryProblem& p) {
  const auto c = parameters<T>(p);
  constexpr int any = math::any_power, whole = math::whole_power;
  switch (static_cast<BinaryKind>(p.kind)) {
    case BinaryKind::focal_star: return formulas<BinaryKind::focal_star, any, any, false>(c);
    case BinaryKind::asymmetric: return c.margin > 0 ? asymmetric_formulas<true>(c) : asymmetric_formulas<false>(c);
    default:
      if (c.gamma_pos.whole == 0) return formulas<BinaryKind::focal, 0, 0, false>(c);
      if (c.gamma_pos.whole == 2) return formulas<BinaryKind::focal, 2, 2, false>(c);
      return c.gamma_pos.whole >= 0 ? formulas<BinaryKind::focal, whole, whole, false>(c)
                                    : formulas<BinaryKind::focal, any, any, false>(c);
  }
}

struct Labels {
  bool bad, soft, masked_class;
};

// Which labels there are.
template <class T>
Labels inspect(int64_t n, const Chunk<T>& k) {
  const T* __restrict z = k.z;
  const T* __restrict t = k.t;
  int outside = 0, between = 0, gone = 0;
  for (int64_t i = 0; i < n; ++i) {
    outside |= !(t[i] >= 0) | !(t[i] <= 1);
    between |= (t[i] > 0) & (t[i] < 1);
    gone |= (z[i] == -math::infinity<T>)&(t[i] == 0);
  }
  return {outside != 0, between != 0, gone != 0};
}

// Which entries are alive: not masked, and not a masked class's. The others get logit 0 and label 0.
template <class T>
void drop_dead(const BinaryProblem& p, int64_t at, int64_t n, Chunk<T>& k) {
  const uint8_t* mask = p.mask;
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = mask == nullptr || mask[p.mask_by_entry ? at + i : (at + i) / p.row] != 0;
    const bool live = counts && !(k.z[i] == -math::infinity<T> && k.t[i] == 0);
    k.live[i] = live;
    k.z_buffer[i] = live ? k.z[i] : T(0);
    k.t_buffer[i] = live ? k.t[i] : T(0);
  }
  k.z = k.z_buffer;
  k.t = k.t_buffer;
}

// Entries [at, at + n), and whether all of them count.
template <class T>
std::pair<Labels, bool> read(const BinaryProblem& p, int64_t at, int64_t n, Chunk<T>& k) {
  k.z = in_place<T>(p.logits, p.logits_type, at, n, k.z_buffer);
  k.t = in_place<T>(p.target, p.target_type, at, n, k.t_buffer);
  Labels labels = inspect(n, k);
  const bool all = p.mask == nullptr && !labels.masked_class;
  if (!all) {
    drop_dead(p, at, n, k);
    const bool masked_class = labels.masked_class;
    labels = inspect(n, k);  // what does not count may hold anything
    labels.masked_class = masked_class;
  }
  return {labels, all};
}

template <class T>
int64_t live_entries(const Chunk<T>& k, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) count += k.live[i];
  return count;
}

// How many entries of a row count.
template <class T>
int64_t count_row(const BinaryProblem& p, int64_t row, Chunk<T>& k) {
  int64_t count = 0;
  for (int64_t j = 0; j < p.row; j += binary_chunk) {
    const int64_t n = p.row - j < binary_chunk ? p.row - j : binary_chunk;
    const bool all = read(p, row * p.row + j, n, k).second;
    count += all ? n : live_entries(k, 0, n);
  }
  return count;
}

// Labels and weights of entries whose positive part has a weight of its own.
template <class T>
void weigh_positives(const BinaryProblem& p, int64_t n, int64_t in_row, Chunk<T>& k) {
  const T* __restrict pi = static_cast<const T*>(p.positive_weight) + in_row;
  const T* __restrict w = static_cast<const T*>(p.entry_weight) + in_row;
  for (int64_t i = 0; i < n; ++i) {
    T t = k.t[i];
    k.weight[i] = w[i] * math::weigh_positive(pi[i], t);
    k.t_buffer[i] = t;
  }
  k.t = k.t_buffer;
}

// Value and slope of entries [at, at + n), weighted by class; those that do not count are 0. Returns what was seen, and
// whether all count (else `live` says which do).
template <class T>
std::pair<Labels, bool> compute(const BinaryProblem& p, const Formulas<T>& f, int64_t at, int64_t n, int64_t in_row,
                                Chunk<T>& k) {
  const auto [labels, all] = read(p, at, n, k);
  if (p.positive_weight != nullptr) weigh_positives(p, n, in_row, k);
  f.hard(n, f.c, k);
  if (labels.soft) f.soft(n, f.c, k);
  if (p.entry_weight != nullptr) {
    const T* w = p.positive_weight != nullptr ? k.weight : static_cast<const T*>(p.entry_weight) + in_row;
    for (int64_t i = 0; i < n; ++i) {
      k.value[i] *= w[i];
      k.slope[i] *= w[i];
    }
  }
  if (!all) {
    for (int64_t i = 0; i < n; ++i) {
      k.value[i] = k.live[i] ? k.value[i] : T(0);
      k.slope[i] = k.live[i] ? k.slope[i] : T(0);
    }
  }
  return {labels, all};
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

// Slopes [from, to) of the chunk, times `factor`, to the gradient of entries at + from and on.
template <class T>
void write(const BinaryProblem& p, const Chunk<T>& k, int64_t at, int64_t from, int64_t to, T factor, void* grad) {
  with_float_type(p.logits_type, [&](auto* s) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
    S* __restrict out = static_cast<S*>(grad) + at;
    for (int64_t i = from; i < to; ++i) out[i] = Narrow<S>::from(k.slope[i] * factor);
  });
}

template <class T>
double flat_of(const BinaryProblem& p, int64_t begin, int64_t end, double scale, void* grad, BinarySeen& seen) {
  const auto f = formulas<T>(p);
  const Type type = std::is_same_v<T, double> ? Type::float64 : Type::float32;
  const bool plain = p.logits_type == type && p.target_type == type && p.entry_weight == nullptr && p.mask == nullptr;
  Chunk<T> k;
  double total = 0;
  for_chunks(p.row, begin, end, [&](int64_t at, int64_t n, int64_t in_row) {
    if (plain) {
      bool odd = false;
      const T* z = static_cast<const T*>(p.logits) + at;
      const T* t = static_cast<const T*>(p.target) + at;
      T* out = grad == nullptr ? nullptr : static_cast<T*>(grad) + at;
      const T some = (out == nullptr ? f.value : f.value_and_slope)(n, z, t, f.c, static_cast<T>(scale), out, odd);
      if (!odd) {
        total += static_cast<double>(some);
        return;
      }
    }
    note(compute(p, f, at, n, in_row, k).first, seen);
    total += static_cast<double>(sum(k.value, n));
    if (grad != nullptr) write(p, k, at, 0, n, static_cast<T>(scale), grad);
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
    const auto [labels, all] = compute(p, f, at, n, in_row, k);
    note(labels, seen);
    const int64_t length = p.row < binary_chunk ? p.row : n;
    for (int64_t j = 0; j < n; j += length) {
      s[(at + j) / p.row] += length == 1 ? k.value[j] : sum(k.value + j, length);
      c[(at + j) / p.row] += static_cast<T>(all ? length : live_entries(k, j, j + length));
    }
  });
}

template <class T>
void grad_of(const BinaryProblem& p, int64_t begin, int64_t end, const void* by_row, double scale, bool mean,
             void* grad) {
  const auto f = formulas<T>(p);
  const T* g = static_cast<const T*>(by_row);
  Chunk<T> k;
  // Rows that are no longer than a chunk are counted in it; longer ones need a pass of their own.
  const bool within = p.row < binary_chunk;
  int64_t counted_row = -1, count = 0;
  for_chunks(p.row, begin, end, [&](int64_t at, int64_t n, int64_t in_row) {
    if (mean && !within && at / p.row != counted_row) {
      counted_row = at / p.row;
      count = count_row(p, counted_row, k);
    }
    const bool all = compute(p, f, at, n, in_row, k).second;
    const int64_t length = within ? p.row : n;
    for (int64_t j = 0; j < n; j += length) {
      if (within) count = all ? length : live_entries(k, j, j + length);
      T factor = static_cast<T>(scale) * (g == nullptr ? T(1) : g[(at + j) / p.row]);
      if (mean) factor /= static_cast<T>(count > 0 ? count : 1);
      if (!all && !(factor == factor && factor - factor == 0)) {  // 0 * inf: an entry that does not count stays 0
        for (int64_t i = j; i < j + length; ++i) k.slope[i] = k.live[i] ? k.slope[i] * factor : T(0);
        factor = 1;
      }
      write(p, k, at, j, j + length, factor, grad);
    }
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

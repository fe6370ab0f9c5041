// Pairwise family: which pairs of rows belong together, and formulas at one pair.
#pragma once

#include "primitives.h"

namespace counterpoise::math {

// What a pair must meet to be a positive or a candidate; the rules of counterpoise/contrastive/info_nce.py.
enum class PairRule : int { every = 0, not_self = 1, same_label = 2, same_class = 3, positive_or_bank = 4, none = 5 };

// Ids are a row, what identifies it, and a label: negative labels are unknown, keys of a bank have negative rows.
template <class Id>
struct PairIds {
  Id row, label;
};

template <PairRule Rule, class Id>
CP_INLINE bool holds(PairIds<Id> query, PairIds<Id> key) {
  const bool other = query.row != key.row;
  const bool alike = (query.label == key.label) & (key.label >= 0);
  if constexpr (Rule == PairRule::not_self) return other;
  if constexpr (Rule == PairRule::same_label) return alike & other;
  if constexpr (Rule == PairRule::same_class) return alike | !other;
  if constexpr (Rule == PairRule::positive_or_bank) return (alike & other) | (key.row < 0);
  return Rule == PairRule::every;
}

// -log sigmoid(z) and its slope, -sigmoid(-z).
template <class T>
struct LogSigmoid {
  T cost, slope;
};

template <class T>
CP_INLINE LogSigmoid<T> log_sigmoid(T z) {
  const T size = z < 0 ? -z : z;
  const T e = exp(-size);
  const T near = T(1) / (1 + e), far = e / (1 + e);
  const T low = z < 0 ? -z : T(0);
  return {low + log1p_unit(e).log, z < 0 ? -near : -far};
}

}  // namespace counterpoise::math

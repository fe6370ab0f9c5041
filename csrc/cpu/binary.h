// Element-wise family: what the loops are given and what they offer.
#pragma once

#include "capability.h"

namespace counterpoise {

// Rows of `row` entries each.
struct BinaryProblem {
  const void* logits;
  const void* target;
  const uint8_t* mask;       // one byte a row or an entry, null = all count
  const void* entry_weight;  // (row * rows_a_chunk), in the type that is computed in; null = ones
  const void* positive_weight;  // of the same size, for focal with exponent 0 alone; null = ones
  Type logits_type, target_type;
  bool mask_by_entry;
  int64_t rows, row;
  int kind;  // math::BinaryKind
  double gamma_pos, gamma_neg, alpha_pos, alpha_neg, margin, log_eps, beta;
  bool detach;
};

// What a pass over some entries saw.
struct BinarySeen {
  bool bad_target;   // a label outside [0, 1]
  bool masked_class;  // a logit of -infinity whose label is 0
};

constexpr int64_t binary_chunk = 512;   // entries that are taken together
constexpr int64_t binary_block = 1 << 15;  // entries (or a little less) behind one partial sum

inline int64_t rows_a_chunk(int64_t row) { return row > 0 && row < binary_chunk ? binary_chunk / row : 1; }

struct BinaryTable {
  // All entries of rows [begin, end) count: their sum, and (unless null) slopes times `scale` at `grad`.
  double (*flat)(const BinaryProblem&, int64_t begin, int64_t end, double scale, void* grad, BinarySeen&);
  // Sums and counts of the entries that count, of rows [begin, end), in the type that is computed in.
  void (*rows)(const BinaryProblem&, int64_t begin, int64_t end, void* sums, void* counts, BinarySeen&);
  // Slopes of rows [begin, end), times `by_row` (null = 1) and `scale`, over the row's count with `mean`.
  void (*grad)(const BinaryProblem&, int64_t begin, int64_t end, const void* by_row, double scale, bool mean, void* grad);
};

CP_DECLARE_TABLE(BinaryTable, binary_table)

}  // namespace counterpoise

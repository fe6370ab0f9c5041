// Row-wise family: what the loops are given and what they offer.
#pragma once

#include "capability.h"

namespace counterpoise {

// Logits (rows, classes); the vectors (classes,) and all results but gradients are in the type that is computed in.
struct RowProblem {
  const void* logits;
  Type logits_type;
  const int64_t* target;
  const uint8_t* mask;  // one byte a row, null = all count
  const void *additive, *multiplicative, *margin, *class_weight;  // null = off
  int64_t rows, classes, ignore_index;
  int kind;  // math::RowKind
  double scale, smoothing, gamma_pos, gamma_neg;
  bool detach;
};

inline bool row_counts(const RowProblem& p, int64_t row) {
  return p.target[row] != p.ignore_index && (p.mask == nullptr || p.mask[row] != 0);
}

constexpr int64_t row_chunk = 1024;      // classes that are taken together
constexpr int64_t row_piece = 1 << 15;   // classes of a long row that one thread takes
constexpr int64_t row_state = 5;         // numbers a row that the backward pass needs: RowSlopes without the loss

constexpr int64_t row_kept = 1 << 20;    // classes of the longest row whose exponentials are kept

inline int64_t logit_size(const RowProblem& p) {
  const bool half = p.logits_type == Type::bfloat16 || p.logits_type == Type::float16;
  return half ? 2 : (p.logits_type == Type::float64 ? 8 : 4);
}

// Whether the gradient goes past the caches: it is too large to be found in them, and a line would be read before it is
// written. Exponentials are then kept beside it, in what the second cache holds.
inline bool row_streams(const RowProblem& p) {
  return p.classes <= (1 << 16) && p.rows * p.classes * logit_size(p) >= (int64_t(1) << 25);
}

// Sums over a piece of a row; `top` is the largest logit in it or the target's, whichever is larger.
struct RowPiece {
  double top, others, live, live_weight, gap, off_value, off_slope;
};

struct RowTable {
  // Losses and (unless null) states of rows [begin, end); unless `grad` is null their gradients, times `scale` and
  // `weight` (null = ones). `scratch` holds `classes` numbers where rows are longer than a chunk (and no longer than
  // row_kept), and narrower than what is computed in or streamed.
  void (*rows)(const RowProblem&, int64_t begin, int64_t end, const void* weight, double scale, void* losses,
               void* state, void* scratch, void* grad);
  // Gradients of rows [begin, end) from their states, times `by_row`.
  void (*backward)(const RowProblem&, int64_t begin, int64_t end, const void* state, const void* by_row, void* grad);

  // One row in pieces [from, to) that start at multiples of a chunk. The row counts, except in slopes().
  RowPiece (*sums)(const RowProblem&, int64_t row, int64_t from, int64_t to);
  double (*log_total)(const RowProblem&, int64_t row, const RowPiece& of_row);
  void (*off)(const RowProblem&, int64_t row, int64_t from, int64_t to, double shift, RowPiece&);
  void (*outcome)(const RowProblem&, int64_t row, const RowPiece& of_row, void* losses, void* state);
  void (*slopes)(const RowProblem&, int64_t row, int64_t from, int64_t to, const void* state, double factor, void* grad);
};

CP_DECLARE_TABLE(RowTable, row_table)

}  // namespace counterpoise

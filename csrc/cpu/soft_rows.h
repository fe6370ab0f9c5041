// Row-wise family with distributions as targets: what the loops are given and what they offer.
#pragma once

#include "capability.h"

namespace counterpoise {

// Logits and targets (rows, classes); the vectors (classes,) and all results but gradients are in the type that is
// computed in.
struct SoftRowProblem {
  const void *logits, *target;
  Type logits_type, target_type;
  const uint8_t* mask;  // one byte a row, null = all count
  const void *multiplicative, *additive, *margin, *class_weight;  // null = off
  int64_t rows, classes;
  bool divergence;  // less the target's entropy; without smoothing
  double scale, smoothing;
  double target_scale;  // targets are logits, the softmax is of so many times them; 0: they are probabilities
};

inline bool row_counts(const SoftRowProblem& p, int64_t row) { return p.mask == nullptr || p.mask[row] != 0; }

constexpr int64_t soft_row_chunk = 1024;    // classes that are taken together
constexpr int64_t soft_row_kept = 1 << 20;  // classes of the longest row whose exponentials are kept
// Numbers a row that the backward pass needs: SoftRowSlopes but the loss, and TargetSoftmax.
constexpr int64_t soft_row_state = 5;

struct SoftRowTable {
  // Losses and (unless null) states of rows [begin, end); unless `grad` is null their gradients, times `scale` and
  // `weight` (null = ones). Whether a target lies outside [0, 1].
  bool (*rows)(const SoftRowProblem&, int64_t begin, int64_t end, const void* weight, double scale, void* losses,
               void* state, void* grad);
  // Gradients of rows [begin, end) from their states, times `by_row`.
  void (*backward)(const SoftRowProblem&, int64_t begin, int64_t end, const void* state, const void* by_row,
                   void* grad);
};

CP_DECLARE_TABLE(SoftRowTable, soft_row_table)

}  // namespace counterpoise

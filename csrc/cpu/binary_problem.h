// Element-wise family: the arguments that its operators share, for both back ends.
#pragma once

#include <optional>

#include "binary.h"
#include "tensors.h"

namespace counterpoise {

// Logits (N, ...) and all that goes with them are contiguous; `entry_weight` holds whole rows, several where rows are
// short.
inline BinaryProblem binary_problem(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
                                    const std::optional<Tensor>& entry_weight, int64_t row, int64_t kind,
                                    double gamma_pos, double gamma_neg, double alpha_pos, double alpha_neg,
                                    double margin, double log_eps, double beta, bool detach) {
  const int64_t entries = logits.numel();
  return {logits.const_data_ptr(),
          target.const_data_ptr(),
          static_cast<const uint8_t*>(data_of(mask)),
          data_of(entry_weight),
          type_of(logits),
          type_of(target),
          mask && mask->numel() == entries,
          row > 0 ? entries / row : 0,
          row,
          static_cast<int>(kind),
          gamma_pos,
          gamma_neg,
          alpha_pos,
          alpha_neg,
          margin,
          log_eps,
          beta,
          detach};
}

#define CP_BINARY_SETTINGS                                                                                     \
  const Tensor &logits, const Tensor &target, std::optional<Tensor> mask, std::optional<Tensor> entry_weight,  \
      int64_t row, int64_t kind, double gamma_pos, double gamma_neg, double alpha_pos, double alpha_neg,       \
      double margin, double log_eps, double beta, bool detach
#define CP_BINARY_PROBLEM                                                                                      \
  binary_problem(logits, target, mask, entry_weight, row, kind, gamma_pos, gamma_neg, alpha_pos, alpha_neg,    \
                 margin, log_eps, beta, detach)

}  // namespace counterpoise

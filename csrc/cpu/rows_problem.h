// The row-wise operators' arguments as the plain structure that the loops of both back ends are given.
#pragma once

#include <optional>

#include "rows.h"
#include "tensors.h"

namespace counterpoise {

// Logits (N, C) and all that goes with them are contiguous; target is int64, mask and target are (N,).
inline RowProblem row_problem(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
                              const std::optional<Tensor>& additive, const std::optional<Tensor>& multiplicative,
                              const std::optional<Tensor>& margin, const std::optional<Tensor>& class_weight, int64_t kind,
                              double scale, double smoothing, double gamma_pos, double gamma_neg, bool detach,
                              int64_t ignore_index) {
  return {logits.const_data_ptr(),
          type_of(logits),
          static_cast<const int64_t*>(target.const_data_ptr()),
          static_cast<const uint8_t*>(data_of(mask)),
          data_of(additive),
          data_of(multiplicative),
          data_of(margin),
          data_of(class_weight),
          logits.size(0),
          logits.size(1),
          ignore_index,
          static_cast<int>(kind),
          scale,
          smoothing,
          gamma_pos,
          gamma_neg,
          detach};
}

#define CP_ROW_SETTINGS                                                                                            \
  const Tensor &logits, const Tensor &target, std::optional<Tensor> mask, std::optional<Tensor> additive,          \
      std::optional<Tensor> multiplicative, std::optional<Tensor> margin, std::optional<Tensor> class_weight,      \
      int64_t kind, double scale, double smoothing, double gamma_pos, double gamma_neg, bool detach,               \
      int64_t ignore_index
#define CP_ROW_PROBLEM                                                                                             \
  row_problem(logits, target, mask, additive, multiplicative, margin, class_weight, kind, scale, smoothing, gamma_pos, \
          gamma_neg, detach, ignore_index)

// What "mean" divides by; the order of NORMALIZERS in counterpoise/kernels/rows.py.
enum class Divisor : int64_t { number, count, weight, foreground };

}  // namespace counterpoise

// The row-wise operators' arguments as the plain structure that the loops of both back ends are given.
#pragma once

#include <optional>
#include <vector>

#include "rows.h"
#include "tensors.h"

namespace counterpoise {

// The numbers of a call, in the order of Rows in counterpoise/kernels/rows.py.
enum RowSetting { Kind, Scale, Smoothing, GammaPos, GammaNeg, Detach, IgnoreIndex, Normalizer, Number };

// Logits (N, C) and all that goes with them are contiguous; target is int64, mask and target are (N,).
inline RowProblem row_problem(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
                              const std::optional<Tensor>& multiplicative, const std::optional<Tensor>& additive,
                              const std::optional<Tensor>& margin, const std::optional<Tensor>& class_weight,
                              const std::vector<double>& settings) {
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
          static_cast<int64_t>(settings[IgnoreIndex]),
          static_cast<int>(settings[Kind]),
          settings[Scale],
          settings[Smoothing],
          settings[GammaPos],
          settings[GammaNeg],
          settings[Detach] != 0};
}

#define CP_ROW_INPUTS                                                                                     \
  const Tensor &logits, const Tensor &target, std::optional<Tensor> mask, std::optional<Tensor> multiplicative, \
      std::optional<Tensor> additive, std::optional<Tensor> margin, std::optional<Tensor> class_weight
#define CP_ROW_PROBLEM row_problem(logits, target, mask, multiplicative, additive, margin, class_weight, settings)

// What "mean" divides by; the order of NORMALIZERS in counterpoise/kernels/rows.py.
enum class Divisor : int { number, count, weight, foreground };

}  // namespace counterpoise

// The operators' arguments as the plain structure that the loops of both back ends are given.
#pragma once

#include <optional>
#include <vector>

#include "soft_rows.h"
#include "tensors.h"

namespace counterpoise {

// The numbers of a call, in the order of counterpoise/kernels/soft_rows.py.
enum SoftRowSetting { SoftDivergence, SoftScale, SoftSmoothing, SoftTargetScale, SoftNormalizer, SoftNumber };

// What "mean" divides by; the first codes of NORMALIZERS in counterpoise/kernels/rows.py.
enum class SoftDivisor : int { number, count, weight };

// Logits and targets (N, C) and all that goes with them are contiguous; mask is (N,).
inline SoftRowProblem soft_row_problem(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
                                       const std::optional<Tensor>& multiplicative,
                                       const std::optional<Tensor>& additive, const std::optional<Tensor>& margin,
                                       const std::optional<Tensor>& class_weight, const std::vector<double>& settings) {
  return {logits.const_data_ptr(),
          target.const_data_ptr(),
          type_of(logits),
          type_of(target),
          static_cast<const uint8_t*>(data_of(mask)),
          data_of(multiplicative),
          data_of(additive),
          data_of(margin),
          data_of(class_weight),
          logits.size(0),
          logits.size(1),
          settings[SoftDivergence] != 0,
          settings[SoftScale],
          settings[SoftSmoothing],
          settings[SoftTargetScale]};
}

#define CP_SOFT_ROW_INPUTS                                                                                \
  const Tensor &logits, const Tensor &target, std::optional<Tensor> mask, std::optional<Tensor> multiplicative, \
      std::optional<Tensor> additive, std::optional<Tensor> margin, std::optional<Tensor> class_weight
#define CP_SOFT_ROW_PROBLEM \
  soft_row_problem(logits, target, mask, multiplicative, additive, margin, class_weight, settings)

}  // namespace counterpoise

// Element-wise family: the arguments that its operators share, for both back ends.
#pragma once

#include <optional>
#include <vector>

#include "binary.h"
#include "tensors.h"

namespace counterpoise {

// The numbers of a call, in the order of counterpoise/kernels/binary.py.
enum BinarySetting { Row, Kind, GammaPos, GammaNeg, AlphaPos, AlphaNeg, Margin, LogEps, Beta, Detach, MeanInRow, Divisor };

// Logits (N, ...) and all that goes with them are contiguous; `entry_weight` holds whole rows, several where rows are
// short, and behind them, if it is (2, ...), as many weights of the positive part.
inline BinaryProblem binary_problem(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& mask,
                                    const std::optional<Tensor>& entry_weight, const std::vector<double>& settings) {
  const int64_t entries = logits.numel(), row = static_cast<int64_t>(settings[Row]);
  BinaryProblem p;
  p.logits = logits.const_data_ptr();
  p.target = target.const_data_ptr();
  p.mask = static_cast<const uint8_t*>(data_of(mask));
  p.entry_weight = data_of(entry_weight);
  p.positive_weight = nullptr;
  if (entry_weight && entry_weight->dim() == 2)
    p.positive_weight = static_cast<const char*>(p.entry_weight) + entry_weight->size(1) * entry_weight->element_size();
  p.logits_type = type_of(logits);
  p.target_type = type_of(target);
  p.mask_by_entry = mask && mask->numel() == entries;
  p.rows = row > 0 ? entries / row : 0;
  p.row = row;
  p.kind = static_cast<int>(settings[Kind]);
  p.gamma_pos = settings[GammaPos];
  p.gamma_neg = settings[GammaNeg];
  p.alpha_pos = settings[AlphaPos];
  p.alpha_neg = settings[AlphaNeg];
  p.margin = settings[Margin];
  p.log_eps = settings[LogEps];
  p.beta = settings[Beta];
  p.detach = settings[Detach] != 0;
  return p;
}

}  // namespace counterpoise

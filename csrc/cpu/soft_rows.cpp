// Operators of the row-wise family with distributions as targets; the schemas stand in
// counterpoise/kernels/soft_rows.py.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

#include "soft_rows_problem.h"

namespace counterpoise {
namespace {

constexpr int64_t small_job = 1 << 13;  // entries that one thread does faster than several start

double number_at(const void* x, bool as_double, int64_t i) {
  return as_double ? static_cast<const double*>(x)[i] : static_cast<const float*>(x)[i];
}

double weight_at(const SoftRowProblem& p, const void* weight, int64_t row) {
  return weight == nullptr ? 1.0 : number_at(weight, p.logits_type == Type::float64, row);
}

double divisor_of(const SoftRowProblem& p, const void* weight, SoftDivisor kind, double number) {
  if (kind == SoftDivisor::number) return number;
  int64_t count = 0;
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!row_counts(p, i)) continue;
    ++count;
    total += weight_at(p, weight, i);
  }
  if (kind == SoftDivisor::weight) return total != 0 ? total : 1.0;
  return static_cast<double>(std::max<int64_t>(1, count));
}

// Blocks of rows for one thread each.
template <class F>
void each_block(const SoftRowProblem& p, const F& f) {
  parallel(p.rows, std::max<int64_t>(1, small_job / std::max<int64_t>(1, p.classes)), f);
}

// As in the table, over all rows.
void rows_into(const SoftRowProblem& p, const void* weight, double scale, void* losses, void* state, void* grad) {
  std::atomic<bool> bad = false;
  each_block(p, [&](int64_t b, int64_t e) {
    if (CP_BEST(soft_row_table).rows(p, b, e, weight, scale, losses, state, grad)) bad = true;
  });
  STD_TORCH_CHECK(!bad, "target holds a value outside [0, 1]");
}

void soft_rows_each(CP_SOFT_ROW_INPUTS, std::vector<double> settings, Tensor losses, Tensor state) {
  rows_into(CP_SOFT_ROW_PROBLEM, nullptr, 1.0, losses.mutable_data_ptr(), state.mutable_data_ptr(), nullptr);
}

void soft_rows_backward(CP_SOFT_ROW_INPUTS, std::vector<double> settings, const Tensor& state, const Tensor& by_row,
                        Tensor grad) {
  const SoftRowProblem p = CP_SOFT_ROW_PROBLEM;
  const void *s = state.const_data_ptr(), *f = by_row.const_data_ptr();
  void* g = untouched(grad);
  each_block(p, [&](int64_t b, int64_t e) { CP_BEST(soft_row_table).backward(p, b, e, s, f, g); });
}

double weighted_total(const SoftRowProblem& p, const void* losses, const void* weight) {
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i)
    if (row_counts(p, i)) total += number_at(losses, p.logits_type == Type::float64, i) * weight_at(p, weight, i);
  return total;
}

// The factor of each row in the total.
void factors_into(const SoftRowProblem& p, const void* weight, double divisor, void* factor) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const double each = weight_at(p, weight, i) / divisor;
    if (p.logits_type == Type::float64) {
      static_cast<double*>(factor)[i] = each;
    } else {
      static_cast<float*>(factor)[i] = static_cast<float>(each);
    }
  }
}

// With `grad` the gradient comes with the total; without it `state` and `factor` serve a backward pass.
void soft_rows_total(CP_SOFT_ROW_INPUTS, std::optional<Tensor> weight, std::vector<double> settings, Tensor value,
                     std::optional<Tensor> state, std::optional<Tensor> factor, std::optional<Tensor> grad) {
  const SoftRowProblem p = CP_SOFT_ROW_PROBLEM;
  const void* w = data_of(weight);
  const auto kind = static_cast<SoftDivisor>(static_cast<int>(settings[SoftNormalizer]));
  const double divisor = divisor_of(p, w, kind, settings[SoftNumber]);
  std::vector<std::byte> losses(p.rows * (p.logits_type == Type::float64 ? sizeof(double) : sizeof(float)));
  rows_into(p, w, 1 / divisor, losses.data(), state ? state->mutable_data_ptr() : nullptr,
            grad ? untouched(*grad) : nullptr);
  if (factor) factors_into(p, w, divisor, factor->mutable_data_ptr());
  assign(value, weighted_total(p, losses.data(), w) / divisor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) {
  m.impl("soft_rows_backward", TORCH_BOX(&soft_rows_backward));
  m.impl("soft_rows_each", TORCH_BOX(&soft_rows_each));
  m.impl("soft_rows_total", TORCH_BOX(&soft_rows_total));
}

}  // namespace counterpoise

// Operators of the element-wise family; the schemas stand in counterpoise/kernels/binary.py.
#include "binary.h"

#include <algorithm>
#include <vector>

#include "binary_problem.h"

namespace counterpoise {
namespace {

constexpr int64_t small_job = 1 << 13;  // entries that one thread does faster than several start

void check_target(const BinarySeen& seen) { STD_TORCH_CHECK(!seen.bad_target, "target holds a value outside [0, 1]"); }

// Sums and counts of rows.
BinarySeen rows_into(const BinaryProblem& p, Tensor& sums, Tensor& counts) {
  std::vector<BinarySeen> seen;
  const int64_t step = p.row > 0 ? std::max<int64_t>(1, binary_block / p.row / rows_a_chunk(p.row)) * rows_a_chunk(p.row)
                                 : p.rows;
  const int64_t blocks = p.rows > 0 ? (p.rows + step - 1) / step : 0;
  seen.resize(blocks, BinarySeen{false, false});
  parallel(blocks, std::max<int64_t>(1, small_job / std::max<int64_t>(1, step * p.row)), [&](int64_t b, int64_t e) {
    for (; b < e; ++b)
      CP_BEST(binary_table).rows(p, b * step, std::min(p.rows, (b + 1) * step), sums.mutable_data_ptr(),
                          counts.mutable_data_ptr(), seen[b]);
  });
  BinarySeen all{false, false};
  for (const auto& s : seen) {
    all.bad_target |= s.bad_target;
    all.masked_class |= s.masked_class;
  }
  return all;
}

void binary_rows(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                 std::optional<Tensor> entry_weight, std::vector<double> settings, Tensor sums, Tensor counts) {
  check_target(rows_into(binary_problem(logits, target, mask, entry_weight, settings), sums, counts));
}

// One pass where every entry counts, in blocks whose sums are added in order.
struct Flat {
  double total;
  BinarySeen seen;
};

Flat flat(const BinaryProblem& p, double scale, void* grad) {
  const int64_t together = rows_a_chunk(p.row);
  const int64_t step = std::max<int64_t>(1, binary_block / std::max<int64_t>(1, p.row * together)) * together;
  const int64_t blocks = p.rows > 0 ? (p.rows + step - 1) / step : 0;
  std::vector<double> sums(blocks, 0.0);
  std::vector<BinarySeen> seen(blocks, BinarySeen{false, false});
  parallel(blocks, 1, [&](int64_t b, int64_t e) {
    for (; b < e; ++b)
      sums[b] = CP_BEST(binary_table).flat(p, b * step, std::min(p.rows, (b + 1) * step), scale, grad, seen[b]);
  });
  Flat all{0.0, {false, false}};
  for (int64_t b = 0; b < blocks; ++b) {
    all.total += sums[b];
    all.seen.bad_target |= seen[b].bad_target;
    all.seen.masked_class |= seen[b].masked_class;
  }
  return all;
}

void grad_into(const BinaryProblem& p, const void* by_row, double scale, bool mean, void* grad) {
  const int64_t together = rows_a_chunk(p.row);
  const int64_t chunks = p.rows > 0 ? (p.rows + together - 1) / together : 0;
  const int64_t size = std::max<int64_t>(1, p.row * together);
  parallel(chunks, std::max<int64_t>(1, small_job / size), [&](int64_t b, int64_t e) {
    CP_BEST(binary_table).grad(p, b * together, std::min(p.rows, e * together), by_row, scale, mean, grad);
  });
}

double value_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? *static_cast<const double*>(x.const_data_ptr())
                                               : *static_cast<const float*>(x.const_data_ptr());
}

template <class T>
double weighted_total(const Tensor& sums, const Tensor& counts, const std::optional<Tensor>& weight, bool mean,
                      std::vector<T>& by_row, double& rows_that_count) {
  const T *s = static_cast<const T*>(sums.const_data_ptr()), *c = static_cast<const T*>(counts.const_data_ptr());
  const T* w = static_cast<const T*>(data_of(weight));
  const int64_t rows = sums.numel();
  double total = 0;
  rows_that_count = 0;
  if (weight) by_row.resize(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const T factor = w == nullptr ? T(1) : w[i];
    if (weight) by_row[i] = factor;
    if (c[i] == 0) continue;
    total += static_cast<double>(factor) * static_cast<double>(mean ? s[i] / c[i] : s[i]);
    ++rows_that_count;
  }
  return total;
}

// The sum or mean over rows, and the gradient with respect to the logits unless that is not wanted.
struct Total {
  double value, divisor;
};

template <class T>
Total total_of(const Tensor& logits, const BinaryProblem& p, const std::optional<Tensor>& weight, bool mean_in_row,
                double divisor, void* grad) {
  const double within = mean_in_row ? 1.0 / std::max<int64_t>(1, p.row) : 1.0;
  const bool by_count = divisor == 0;
  if (p.mask == nullptr && !weight) {
    const double all_rows = by_count ? static_cast<double>(std::max<int64_t>(1, p.rows)) : divisor;
    const Flat all = flat(p, within / all_rows, grad);
    check_target(all.seen);
    if (!all.seen.masked_class) return {all.total * within / all_rows, all_rows};
  }
  Tensor sums = empty_as(logits, {p.rows}, computed_type(logits));
  Tensor counts = empty_as(logits, {p.rows}, computed_type(logits));
  check_target(rows_into(p, sums, counts));
  std::vector<T> by_row;
  double rows_that_count = 0;
  const double total = weighted_total<T>(sums, counts, weight, mean_in_row, by_row, rows_that_count);
  if (by_count) divisor = std::max(1.0, rows_that_count);
  if (grad != nullptr) grad_into(p, by_row.empty() ? nullptr : by_row.data(), 1 / divisor, mean_in_row, grad);
  return {total / divisor, divisor};
}

Total total_of(const Tensor& logits, const BinaryProblem& p, const std::optional<Tensor>& weight, bool mean_in_row,
                double divisor, void* grad) {
  return computed_type(logits) == ScalarType::Double ? total_of<double>(logits, p, weight, mean_in_row, divisor, grad)
                                                     : total_of<float>(logits, p, weight, mean_in_row, divisor, grad);
}

// The total; what it was divided by and the gradient, where they are asked for.
void binary_total(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                  std::optional<Tensor> entry_weight, std::optional<Tensor> weight, std::vector<double> settings,
                  Tensor value, std::optional<Tensor> divisor, std::optional<Tensor> grad) {
  const BinaryProblem p = binary_problem(logits, target, mask, entry_weight, settings);
  const Total total = total_of(logits, p, weight, settings[MeanInRow] != 0, settings[Divisor],
                               grad ? untouched(*grad) : nullptr);
  assign(value, total.value);
  if (divisor) assign(*divisor, total.divisor);
}

void binary_total_backward(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                           std::optional<Tensor> entry_weight, std::optional<Tensor> weight,
                           std::vector<double> settings, const Tensor& upstream, const Tensor& divisor, Tensor grad) {
  grad_into(binary_problem(logits, target, mask, entry_weight, settings), data_of(weight),
            value_of(upstream) / value_of(divisor), settings[MeanInRow] != 0, untouched(grad));
}

void binary_rows_backward(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                          std::optional<Tensor> entry_weight, std::vector<double> settings, const Tensor& by_row,
                          Tensor grad) {
  grad_into(binary_problem(logits, target, mask, entry_weight, settings), by_row.const_data_ptr(), 1.0, false,
            untouched(grad));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) {
  m.impl("binary_rows", TORCH_BOX(&binary_rows));
  m.impl("binary_rows_backward", TORCH_BOX(&binary_rows_backward));
  m.impl("binary_total", TORCH_BOX(&binary_total));
  m.impl("binary_total_backward", TORCH_BOX(&binary_total_backward));
}

}  // namespace counterpoise

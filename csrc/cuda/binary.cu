// Operators of the element-wise family on a GPU; the schemas stand in counterpoise/kernels/binary.py.
#include "binary.cuh"

#include <tuple>

#include "../cpu/binary_problem.h"
#include "device.h"

namespace counterpoise {
namespace {

Tensor partials_of(const Tensor& logits) {
  return empty_as(logits, {cuda::binary_partials, 2}, ScalarType::Double);
}

std::tuple<Tensor, Tensor> binary_rows(CP_BINARY_SETTINGS) {
  const OnDevice device(logits);
  const BinaryProblem p = CP_BINARY_PROBLEM;
  Tensor sums = empty_as(logits, {p.rows}, computed_type(logits));
  Tensor counts = empty_as(logits, {p.rows}, computed_type(logits));
  cuda::with_float_type(p.logits_type, [&](auto* s) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
    cuda::binary_rows_on<S>(p, sums.mutable_data_ptr(), counts.mutable_data_ptr(), device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sums, counts};
}

Tensor grad_of(const Tensor& logits, const BinaryProblem& p, const void* by_row, const void* upstream,
               const void* divisor, bool mean, void* stream) {
  Tensor grad = torch::stable::empty_like(logits);
  cuda::with_float_type(p.logits_type, [&](auto* s) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
    cuda::binary_grad_on<S>(p, by_row, upstream, divisor, mean, grad.mutable_data_ptr(), stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad;
}

Tensor binary_rows_backward(CP_BINARY_SETTINGS, const Tensor& by_row) {
  const OnDevice device(logits);
  return grad_of(logits, CP_BINARY_PROBLEM, by_row.const_data_ptr(), nullptr, nullptr, false, device.stream());
}

// The total, and what it was divided by.
std::tuple<Tensor, Tensor> total_of(const Tensor& logits, const BinaryProblem& p, const std::optional<Tensor>& weight,
                                    bool mean_in_row, double divisor, void* stream) {
  Tensor partials = partials_of(logits);
  Tensor total = empty_as(logits, {}, computed_type(logits));
  Tensor divided_by = empty_as(logits, {}, computed_type(logits));
  const cuda::BinaryTotal t = {data_of(weight), mean_in_row, divisor, partials.mutable_data_ptr(),
                               total.mutable_data_ptr(), divided_by.mutable_data_ptr()};
  cuda::with_float_type(p.logits_type, [&](auto* s) {
    using S = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
    cuda::binary_total_on<S>(p, t, stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {total, divided_by};
}

std::tuple<Tensor, Tensor> binary_total(CP_BINARY_SETTINGS, std::optional<Tensor> weight, bool mean_in_row,
                                        double divisor) {
  const OnDevice device(logits);
  return total_of(logits, CP_BINARY_PROBLEM, weight, mean_in_row, divisor, device.stream());
}

std::tuple<Tensor, Tensor> binary_total_grad(CP_BINARY_SETTINGS, std::optional<Tensor> weight, bool mean_in_row,
                                             double divisor) {
  const OnDevice device(logits);
  const BinaryProblem p = CP_BINARY_PROBLEM;
  const auto [total, divided_by] = total_of(logits, p, weight, mean_in_row, divisor, device.stream());
  return {total, grad_of(logits, p, data_of(weight), nullptr, divided_by.const_data_ptr(), mean_in_row, device.stream())};
}

Tensor binary_total_backward(CP_BINARY_SETTINGS, std::optional<Tensor> weight, bool mean_in_row,
                             const Tensor& upstream, const Tensor& divisor) {
  const OnDevice device(logits);
  return grad_of(logits, CP_BINARY_PROBLEM, data_of(weight), upstream.const_data_ptr(), divisor.const_data_ptr(),
                 mean_in_row, device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("binary_rows", TORCH_BOX(&binary_rows));
  m.impl("binary_rows_backward", TORCH_BOX(&binary_rows_backward));
  m.impl("binary_total", TORCH_BOX(&binary_total));
  m.impl("binary_total_backward", TORCH_BOX(&binary_total_backward));
  m.impl("binary_total_grad", TORCH_BOX(&binary_total_grad));
}

}  // namespace counterpoise

// Operators of the element-wise family on a GPU; the schemas stand in counterpoise/kernels/binary.py.
#include "binary_both.cuh"

#include "../cpu/binary_problem.h"
#include "device.h"

namespace counterpoise {
namespace {

// f with the storage type of the logits.
template <class F>
void with_logits_type(const BinaryProblem& p, const F& f) {
  cuda::with_float_type(p.logits_type, [&](auto* s) { f(s); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void binary_rows(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                 std::optional<Tensor> entry_weight, std::vector<double> settings, Tensor sums, Tensor counts) {
  const OnDevice device(logits);
  const BinaryProblem p = binary_problem(logits, target, mask, entry_weight, settings);
  with_logits_type(p, [&](auto* s) {
    cuda::binary_rows_on<cuda::Stored<decltype(s)>>(p, sums.mutable_data_ptr(), counts.mutable_data_ptr(), device.stream());
  });
}

void grad_into(const BinaryProblem& p, const void* by_row, const void* upstream, const void* divisor, bool mean,
               Tensor& grad, void* stream, const void* settled = nullptr) {
  with_logits_type(p, [&](auto* s) {
    cuda::binary_grad_on<cuda::Stored<decltype(s)>>(p, by_row, upstream, divisor, mean, grad.mutable_data_ptr(), stream,
                                              settled);
  });
}

void binary_rows_backward(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                          std::optional<Tensor> entry_weight, std::vector<double> settings, const Tensor& by_row,
                          Tensor grad) {
  const OnDevice device(logits);
  grad_into(binary_problem(logits, target, mask, entry_weight, settings), by_row.const_data_ptr(), nullptr, nullptr,
            false, grad, device.stream());
}

// The total; what it was divided by and the gradient, where they are asked for. A divisor of two numbers asks for the
// gradient in the same pass, and says in the second whether it is settled. Nothing waits for the device.
void binary_total(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                  std::optional<Tensor> entry_weight, std::optional<Tensor> weight, std::vector<double> settings,
                  Tensor value, std::optional<Tensor> divisor, std::optional<Tensor> grad) {
  const OnDevice device(logits);
  const BinaryProblem p = binary_problem(logits, target, mask, entry_weight, settings);
  Tensor partials = empty_as(logits, {cuda::binary_partials, 2}, ScalarType::Double);
  Tensor divided_by = divisor ? *divisor : empty_as(logits, {}, computed_type(logits));
  const bool mean = settings[MeanInRow] != 0;
  const cuda::BinaryTotal t = {data_of(weight),
                               mean,
                               settings[Divisor],
                               partials.mutable_data_ptr(),
                               value.mutable_data_ptr(),
                               divided_by.mutable_data_ptr()};
  const bool both = grad && divided_by.numel() == 2;
  STD_TORCH_CHECK(!both || !(mask || entry_weight || weight), "a gradient in one pass takes no masks and no weights");
  with_logits_type(p, [&](auto* s) {
    using S = cuda::Stored<decltype(s)>;
    both ? cuda::binary_both_on<S>(p, t, grad->mutable_data_ptr(), device.stream())
         : cuda::binary_total_on<S>(p, t, device.stream());
  });
  if (grad && !both) grad_into(p, data_of(weight), nullptr, divided_by.const_data_ptr(), mean, *grad, device.stream());
}

// With a divisor of two numbers `grad` holds what came with the total, which is kept if it is settled.
void binary_total_backward(const Tensor& logits, const Tensor& target, std::optional<Tensor> mask,
                           std::optional<Tensor> entry_weight, std::optional<Tensor> weight,
                           std::vector<double> settings, const Tensor& upstream, const Tensor& divisor, Tensor grad) {
  const OnDevice device(logits);
  const auto* divided_by = static_cast<const char*>(divisor.const_data_ptr());
  const void* settled = divisor.numel() == 2 ? divided_by + divisor.element_size() : nullptr;
  grad_into(binary_problem(logits, target, mask, entry_weight, settings), data_of(weight), upstream.const_data_ptr(),
            divided_by, settings[MeanInRow] != 0, grad, device.stream(), settled);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("binary_rows", TORCH_BOX(&binary_rows));
  m.impl("binary_rows_backward", TORCH_BOX(&binary_rows_backward));
  m.impl("binary_total", TORCH_BOX(&binary_total));
  m.impl("binary_total_backward", TORCH_BOX(&binary_total_backward));
}

}  // namespace counterpoise

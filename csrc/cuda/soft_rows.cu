// Operators of the row-wise family with distributions as targets on a GPU; the schemas stand in
// counterpoise/kernels/soft_rows.py.
#include "kept_soft_rows.cuh"

#include "../cpu/soft_rows_problem.h"
#include "device.h"

namespace counterpoise {
namespace {

// f with the storage types of logits and targets.
template <class F>
void with_types(const SoftRowProblem& p, const F& f) {
  STD_TORCH_CHECK(p.classes <= cuda::row_most_classes, "logits have ", p.classes, " classes, expected at most 2^30");
  cuda::with_soft_types(p, f);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward(const SoftRowProblem& p, Tensor& losses, Tensor& state, void* stream) {
  with_types(p, [&](auto* s, auto* y) {
    cuda::soft_rows_forward_on<cuda::Stored<decltype(s)>, cuda::Stored<decltype(y)>>(p, losses.mutable_data_ptr(),
                                                                         state.mutable_data_ptr(), stream);
  });
}

void gradient(const SoftRowProblem& p, const Tensor& state, const Tensor& by_row, Tensor& grad, void* stream) {
  with_types(p, [&](auto* s, auto* y) {
    cuda::soft_rows_gradient_on<cuda::Stored<decltype(s)>, cuda::Stored<decltype(y)>>(p, state.const_data_ptr(),
                                                                          by_row.const_data_ptr(),
                                                                          grad.mutable_data_ptr(), stream);
  });
}

void soft_rows_each(CP_SOFT_ROW_INPUTS, std::vector<double> settings, Tensor losses, Tensor state) {
  const OnDevice device(logits);
  forward(CP_SOFT_ROW_PROBLEM, losses, state, device.stream());
}

void soft_rows_backward(CP_SOFT_ROW_INPUTS, std::vector<double> settings, const Tensor& state, const Tensor& by_row,
                        Tensor grad) {
  const OnDevice device(logits);
  gradient(CP_SOFT_ROW_PROBLEM, state, by_row, grad, device.stream());
}

int64_t kept_bytes(const SoftRowProblem& p) {
  int64_t bytes = 0;
  cuda::with_float_type(p.logits_type, [&](auto* s) {
    bytes = cuda::kept_bytes<cuda::Stored<decltype(s)>>(p.classes, cuda::kept_soft_threads);
  });
  return bytes;
}

// The total, and either its gradient or the rows' states and the factor of each in the total. Nothing waits for the
// device.
void soft_rows_total(CP_SOFT_ROW_INPUTS, std::optional<Tensor> weight, std::vector<double> settings, Tensor value,
                     std::optional<Tensor> state, std::optional<Tensor> factor, std::optional<Tensor> grad) {
  const OnDevice device(logits);
  const SoftRowProblem p = CP_SOFT_ROW_PROBLEM;
  const ScalarType type = computed_type(logits);
  const int divisor = static_cast<int>(settings[SoftNormalizer]);
  Tensor losses = empty_as(logits, {p.rows}, type);
  Tensor partials = empty_as(logits, {2 * cuda::row_partials + 1}, ScalarType::Double);
  if (grad && has_shared_memory(logits, kept_bytes(p))) {
    with_types(p, [&](auto* s, auto* y) {
      cuda::kept_soft_rows_on<cuda::Stored<decltype(s)>, cuda::Stored<decltype(y)>>(
          p, data_of(weight), divisor, settings[SoftNumber], partials.mutable_data_ptr(), losses.mutable_data_ptr(),
          value.mutable_data_ptr(), grad->mutable_data_ptr(), device.stream());
    });
    return;
  }
  Tensor states = state ? *state : empty_as(logits, {p.rows, soft_row_state}, type);
  Tensor factors = factor ? *factor : empty_as(logits, {p.rows}, type);
  forward(p, losses, states, device.stream());
  const auto add_up = type == ScalarType::Double ? cuda::soft_rows_total_on<double> : cuda::soft_rows_total_on<float>;
  add_up(p, losses.mutable_data_ptr(), data_of(weight), divisor, settings[SoftNumber],
         partials.mutable_data_ptr(), value.mutable_data_ptr(), factors.mutable_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (grad) gradient(p, states, factors, *grad, device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("soft_rows_backward", TORCH_BOX(&soft_rows_backward));
  m.impl("soft_rows_each", TORCH_BOX(&soft_rows_each));
  m.impl("soft_rows_total", TORCH_BOX(&soft_rows_total));
}

}  // namespace counterpoise

// Operators of the row-wise family on a GPU; the schemas stand in counterpoise/kernels/rows.py.
#include "kept_rows.cuh"

#include "../cpu/rows_problem.h"
#include "device.h"

namespace counterpoise {
namespace {

// f with the storage type of the logits.
template <class F>
void with_logits_type(const RowProblem& p, const F& f) {
  STD_TORCH_CHECK(p.classes <= cuda::row_most_classes, "logits have ", p.classes, " classes, expected at most 2^30");
  cuda::with_float_type(p.logits_type, [&](auto* s) { f(s); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward(const RowProblem& p, Tensor& losses, Tensor& state, void* stream) {
  with_logits_type(p, [&](auto* s) {
    cuda::rows_forward_on<cuda::Stored<decltype(s)>>(p, losses.mutable_data_ptr(), state.mutable_data_ptr(), stream);
  });
}

void rows_each(CP_ROW_INPUTS, std::vector<double> settings, Tensor losses, Tensor state) {
  const OnDevice device(logits);
  forward(CP_ROW_PROBLEM, losses, state, device.stream());
}

void rows_backward(CP_ROW_INPUTS, std::vector<double> settings, const Tensor& state, const Tensor& by_row,
                   Tensor grad) {
  const OnDevice device(logits);
  const RowProblem p = CP_ROW_PROBLEM;
  with_logits_type(p, [&](auto* s) {
    cuda::rows_gradient_on<cuda::Stored<decltype(s)>>(p, state.const_data_ptr(), by_row.const_data_ptr(),
                                                grad.mutable_data_ptr(), device.stream());
  });
}

int64_t kept_bytes(const RowProblem& p) {
  int64_t bytes = 0;
  cuda::with_float_type(p.logits_type, [&](auto* s) { bytes = cuda::kept_bytes<cuda::Stored<decltype(s)>>(p.classes); });
  return bytes;
}

// The total, and either its gradient or the rows' states and the factor of each in the total. Nothing waits for the
// device.
void rows_total(CP_ROW_INPUTS, std::optional<Tensor> weight, std::vector<double> settings, Tensor value,
                std::optional<Tensor> state, std::optional<Tensor> factor, std::optional<Tensor> grad) {
  const OnDevice device(logits);
  const RowProblem p = CP_ROW_PROBLEM;
  const ScalarType type = computed_type(logits);
  const int divisor = static_cast<int>(settings[Normalizer]);
  Tensor losses = empty_as(logits, {p.rows}, type);
  Tensor partials = empty_as(logits, {2 * cuda::row_partials + 1}, ScalarType::Double);
  if (grad && has_shared_memory(logits, kept_bytes(p))) {
    with_logits_type(p, [&](auto* s) {
      cuda::kept_rows_on<cuda::Stored<decltype(s)>>(p, data_of(weight), divisor, settings[Number],
                                              partials.mutable_data_ptr(), losses.mutable_data_ptr(),
                                              value.mutable_data_ptr(), grad->mutable_data_ptr(), device.stream());
    });
    return;
  }
  Tensor states = state ? *state : empty_as(logits, {p.rows, row_state}, type);
  Tensor factors = factor ? *factor : empty_as(logits, {p.rows}, type);
  forward(p, losses, states, device.stream());
  with_logits_type(p, [&](auto* s) {
    using S = cuda::Stored<decltype(s)>;
    cuda::rows_total_on<S>(p, losses.mutable_data_ptr(), data_of(weight), divisor, settings[Number],
                           partials.mutable_data_ptr(), value.mutable_data_ptr(), factors.mutable_data_ptr(),
                           device.stream());
    if (grad)
      cuda::rows_gradient_on<S>(p, states.const_data_ptr(), factors.const_data_ptr(), grad->mutable_data_ptr(),
                                device.stream());
  });
}

// A gradient that came with its total, times what comes from above: nothing is read or written where that is one.
void scale_gradient(Tensor grad, const Tensor& upstream) {
  const OnDevice device(grad);
  cuda::with_float_type(type_of(grad), [&](auto* s) {
    cuda::scale_gradient_on<cuda::Stored<decltype(s)>>(grad.mutable_data_ptr(), grad.numel(), upstream.const_data_ptr(),
                                                 device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("rows_backward", TORCH_BOX(&rows_backward));
  m.impl("rows_each", TORCH_BOX(&rows_each));
  m.impl("rows_total", TORCH_BOX(&rows_total));
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient));
}

}  // namespace counterpoise

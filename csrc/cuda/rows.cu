// Operators of the row-wise family on a GPU; the schemas stand in counterpoise/kernels/rows.py.
#include "rows.cuh"

#include <tuple>

#include "../cpu/rows_problem.h"
#include "device.h"

namespace counterpoise {
namespace {

template <class P>
using Stored = std::remove_const_t<std::remove_pointer_t<P>>;

// f with the storage type of the logits.
template <class F>
void with_logits_type(const RowProblem& p, const F& f) {
  cuda::with_float_type(p.logits_type, [&](auto* s) { f(s); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void forward(const RowProblem& p, Tensor& losses, Tensor& state, void* stream) {
  with_logits_type(p, [&](auto* s) {
    cuda::rows_forward_on<Stored<decltype(s)>>(p, losses.mutable_data_ptr(), state.mutable_data_ptr(), stream);
  });
}

std::tuple<Tensor, Tensor> rows_each(CP_ROW_SETTINGS) {
  const OnDevice device(logits);
  const RowProblem p = CP_ROW_PROBLEM;
  Tensor losses = empty_as(logits, {p.rows}, computed_type(logits));
  Tensor state = empty_as(logits, {p.rows, row_state}, computed_type(logits));
  forward(p, losses, state, device.stream());
  return {losses, state};
}

Tensor rows_backward(CP_ROW_SETTINGS, const Tensor& state, const Tensor& by_row) {
  const OnDevice device(logits);
  const RowProblem p = CP_ROW_PROBLEM;
  Tensor grad = torch::stable::empty_like(logits);
  with_logits_type(p, [&](auto* s) {
    cuda::rows_gradient_on<Stored<decltype(s)>>(p, state.const_data_ptr(), by_row.const_data_ptr(),
                                                grad.mutable_data_ptr(), device.stream());
  });
  return grad;
}

// The total, the states of the rows, and the factor of each in the total. Nothing waits for the device.
std::tuple<Tensor, Tensor, Tensor> rows_total(CP_ROW_SETTINGS, std::optional<Tensor> weight, int64_t normalizer,
                                              double number) {
  const OnDevice device(logits);
  const RowProblem p = CP_ROW_PROBLEM;
  Tensor losses = empty_as(logits, {p.rows}, computed_type(logits));
  Tensor state = empty_as(logits, {p.rows, row_state}, computed_type(logits));
  forward(p, losses, state, device.stream());
  Tensor partials = empty_as(logits, {2 * cuda::row_partials + 1}, ScalarType::Double);
  Tensor total = empty_as(logits, {}, computed_type(logits));
  Tensor factor = empty_as(logits, {p.rows}, computed_type(logits));
  with_logits_type(p, [&](auto* s) {
    cuda::rows_total_on<Stored<decltype(s)>>(p, losses.const_data_ptr(), data_of(weight), static_cast<int>(normalizer),
                                             number, partials.mutable_data_ptr(), total.mutable_data_ptr(),
                                             factor.mutable_data_ptr(), device.stream());
  });
  return {total, state, factor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("rows_backward", TORCH_BOX(&rows_backward));
  m.impl("rows_each", TORCH_BOX(&rows_each));
  m.impl("rows_total", TORCH_BOX(&rows_total));
}

}  // namespace counterpoise

// Operators of selection on a GPU: distances of pairs. Picks are followed on the host. The schemas stand in
// counterpoise/kernels/selection.py.
#include "selection.cuh"

#include "device.h"

namespace counterpoise {
namespace {

void check(const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous(), "selection takes contiguous doubles and int64 indices");
}

void selection_distances(const Tensor& x, const Tensor& rows, const Tensor& centres, const Tensor& which, Tensor out) {
  for (const Tensor* numbers : {&x, &centres, static_cast<const Tensor*>(&out)}) check(*numbers, ScalarType::Double);
  for (const Tensor* indices : {&rows, &which}) check(*indices, ScalarType::Long);
  if (out.numel() == 0) return;
  const OnDevice device(x);
  const cuda::SelectionPairs pairs{static_cast<const double*>(x.const_data_ptr()),
                                   static_cast<const int64_t*>(rows.const_data_ptr()),
                                   static_cast<const double*>(centres.const_data_ptr()),
                                   static_cast<const int64_t*>(which.const_data_ptr()),
                                   out.numel(),
                                   x.size(1)};
  cuda::selection_distances_on(pairs, static_cast<double*>(out.mutable_data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) { m.impl("selection_distances", TORCH_BOX(&selection_distances)); }

}  // namespace counterpoise

// Operators of selection; the schemas stand in counterpoise/kernels/selection.py.
#include "selection.h"

#include "tensors.h"

namespace counterpoise {
namespace {

// Everything is contiguous; numbers are doubles, indices 64 bits wide.
void check(const Tensor& x, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous(), "selection takes contiguous doubles and int64 indices");
}

void selection_distances(const Tensor& x, const Tensor& rows, const Tensor& centres, const Tensor& which, Tensor out) {
  for (const Tensor* numbers : {&x, &centres, static_cast<const Tensor*>(&out)}) check(*numbers, ScalarType::Double);
  for (const Tensor* indices : {&rows, &which}) check(*indices, ScalarType::Long);
  const int64_t n = out.numel(), width = x.size(1);
  const auto *from = static_cast<const double*>(x.const_data_ptr()), *to = static_cast<const double*>(centres.const_data_ptr());
  const auto* row = static_cast<const int64_t*>(rows.const_data_ptr());
  const auto* centre = static_cast<const int64_t*>(which.const_data_ptr());
  auto* found = static_cast<double*>(out.mutable_data_ptr());
  parallel(n, (1 << 15) / (width + 1) + 1, [&](int64_t b, int64_t e) {
    CP_BEST(selection_table).distances(from, row + b, to, centre + b, e - b, width, found + b);
  });
}

int64_t selection_follow(const Tensor& points, const Tensor& index, Tensor distance, double bound, int64_t bound_index,
                         Tensor picks, Tensor gaps) {
  for (const Tensor* numbers : {&points, static_cast<const Tensor*>(&distance), static_cast<const Tensor*>(&gaps)})
    check(*numbers, ScalarType::Double);
  for (const Tensor* indices : {&index, static_cast<const Tensor*>(&picks)}) check(*indices, ScalarType::Long);
  const Leaders leaders{static_cast<const double*>(points.const_data_ptr()),
                        static_cast<const int64_t*>(index.const_data_ptr()),
                        static_cast<double*>(distance.mutable_data_ptr()),
                        distance.numel(),
                        points.size(1),
                        bound,
                        bound_index};
  if (leaders.count == 0) return 0;
  return CP_BEST(selection_table)
      .follow(leaders, picks.numel(), static_cast<int64_t*>(picks.mutable_data_ptr()),
              static_cast<double*>(gaps.mutable_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) {
  m.impl("selection_distances", TORCH_BOX(&selection_distances));
  m.impl("selection_follow", TORCH_BOX(&selection_follow));
}

}  // namespace counterpoise

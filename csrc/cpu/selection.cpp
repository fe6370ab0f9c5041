// Operators of selection; the schemas stand in counterpoise/kernels/selection.py.
#include "selection.h"

#include <algorithm>
#include <vector>

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

constexpr int64_t cost_rows = 64;  // of a tile, that are summed together

// Blocks of rows are summed apart and added in order, so that the sums do not depend on the number of threads.
void selection_taken(const Tensor& tile, double rounding, const Tensor& before, std::optional<Tensor> after,
                     Tensor out) {
  for (const Tensor* numbers : {&tile, &before, static_cast<const Tensor*>(&out)}) check(*numbers, ScalarType::Double);
  if (after) check(*after, ScalarType::Double);
  const int64_t rows = tile.size(0), columns = tile.size(1), blocks = (rows + cost_rows - 1) / cost_rows;
  const auto* squares = static_cast<const double*>(tile.const_data_ptr());
  const auto* high = static_cast<const double*>(before.const_data_ptr());
  const auto* low = static_cast<const double*>(data_of(after));
  std::vector<double> sums(blocks * columns);
  parallel(blocks, (1 << 14) / (cost_rows * (columns + 1)) + 1, [&](int64_t b, int64_t e) {
    for (; b < e; ++b) {
      const int64_t begin = b * cost_rows;
      const CostTile part{squares + begin * columns, std::min(rows - begin, cost_rows), columns, rounding};
      CP_BEST(selection_table).taken(part, high + begin, low == nullptr ? nullptr : low + begin, &sums[b * columns]);
    }
  });
  auto* total = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t j = 0; j < columns; ++j) total[j] += sums[b * columns + j];
}

void selection_nearest(const Tensor& costs, int64_t start, bool first, Tensor near, Tensor keys) {
  const int64_t queries = costs.size(0), columns = costs.size(1), count = near.size(1);
  const bool floats = costs.scalar_type() == ScalarType::Float || costs.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(floats && costs.is_contiguous() && near.scalar_type() == costs.scalar_type() && near.is_contiguous(),
                  "selection_nearest takes contiguous floats or doubles");
  check(keys, ScalarType::Long);
  STD_TORCH_CHECK(near.size(0) == queries && keys.numel() == near.numel() && (!first || count <= columns),
                  "selection_nearest: shapes do not fit");
  if (count == 0) return;
  const CostRows rows{costs.const_data_ptr(), type_of(costs), columns, start, count, first};
  void* found = near.mutable_data_ptr();
  auto* numbers = static_cast<int64_t*>(keys.mutable_data_ptr());
  parallel(queries, (1 << 15) / (columns + 1) + 1, [&](int64_t b, int64_t e) {
    CP_BEST(selection_table).nearest(rows, b, e, found, numbers);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) {
  m.impl("selection_distances", TORCH_BOX(&selection_distances));
  m.impl("selection_follow", TORCH_BOX(&selection_follow));
  m.impl("selection_taken", TORCH_BOX(&selection_taken));
  m.impl("selection_nearest", TORCH_BOX(&selection_nearest));
}

}  // namespace counterpoise

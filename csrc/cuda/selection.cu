// Operators of selection on a GPU. Whoever follows picks waits for their number; nothing else waits for the device. The
// schemas stand in counterpoise/kernels/selection.py.
#include "selection.cuh"

#include "device.h"
#include "selection_nearest.cuh"
#include "selection_taken.cuh"

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

int64_t selection_follow(const Tensor& points, const Tensor& index, Tensor distance, double bound, int64_t bound_index,
                         Tensor picks, Tensor gaps) {
  for (const Tensor* numbers : {&points, static_cast<const Tensor*>(&distance), static_cast<const Tensor*>(&gaps)})
    check(*numbers, ScalarType::Double);
  for (const Tensor* indices : {&index, static_cast<const Tensor*>(&picks)}) check(*indices, ScalarType::Long);
  if (distance.numel() == 0 || picks.numel() == 0) return 0;
  const OnDevice device(points);
  const Leaders leaders{static_cast<const double*>(points.const_data_ptr()),
                        static_cast<const int64_t*>(index.const_data_ptr()),
                        static_cast<double*>(distance.mutable_data_ptr()),
                        distance.numel(),
                        points.size(1),
                        bound,
                        bound_index};
  Tensor count = empty_as(index, {1}, ScalarType::Long);
  cuda::selection_follow_on(leaders, picks.numel(), static_cast<int64_t*>(picks.mutable_data_ptr()),
                            static_cast<double*>(gaps.mutable_data_ptr()),
                            static_cast<int64_t*>(count.mutable_data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  int64_t found = 0;
  const auto stream = static_cast<cudaStream_t>(device.stream());
  STD_CUDA_CHECK(cudaMemcpyAsync(&found, count.const_data_ptr(), sizeof(found), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return found;
}

void selection_taken(const Tensor& tile, double rounding, const Tensor& before, std::optional<Tensor> after,
                     Tensor out) {
  for (const Tensor* numbers : {&tile, &before, static_cast<const Tensor*>(&out)}) check(*numbers, ScalarType::Double);
  if (after) check(*after, ScalarType::Double);
  const OnDevice device(tile);
  const cuda::TakenTile p{static_cast<const double*>(tile.const_data_ptr()),
                          static_cast<const double*>(before.const_data_ptr()),
                          static_cast<const double*>(data_of(after)),
                          tile.size(0),
                          tile.size(1),
                          rounding};
  cuda::selection_taken_on(p, static_cast<double*>(out.mutable_data_ptr()), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void selection_nearest(const Tensor& costs, int64_t start, bool first, Tensor near, Tensor keys) {
  const int64_t queries = costs.size(0), columns = costs.size(1), count = near.size(1);
  const bool floats = costs.scalar_type() == ScalarType::Float || costs.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(floats && costs.is_contiguous() && near.scalar_type() == costs.scalar_type() && near.is_contiguous(),
                  "selection_nearest takes contiguous floats or doubles");
  check(keys, ScalarType::Long);
  STD_TORCH_CHECK(near.size(0) == queries && keys.numel() == near.numel() && (!first || count <= columns),
                  "selection_nearest: shapes do not fit");
  STD_TORCH_CHECK(count <= cuda::nearest_most, "selection_nearest keeps at most 2048 costs of a query on a GPU");
  const OnDevice device(costs);
  const CostRows rows{costs.const_data_ptr(), type_of(costs), columns, start, count, first};
  const int64_t parts = cuda::nearest_parts(queries, columns, count), room = parts > 1 ? parts : 0;
  Tensor near_of_parts = empty_as(costs, {queries, room, count}, costs.scalar_type());
  Tensor keys_of_parts = empty_as(costs, {queries, room, count}, ScalarType::Long);
  const auto run = rows.type == Type::float64 ? cuda::selection_nearest_on<double> : cuda::selection_nearest_on<float>;
  run(rows, queries, parts, near_of_parts.mutable_data_ptr(), static_cast<int64_t*>(keys_of_parts.mutable_data_ptr()),
      near.mutable_data_ptr(), static_cast<int64_t*>(keys.mutable_data_ptr()), device.stream(), cuda::nearest_threads);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("selection_distances", TORCH_BOX(&selection_distances));
  m.impl("selection_follow", TORCH_BOX(&selection_follow));
  m.impl("selection_nearest", TORCH_BOX(&selection_nearest));
  m.impl("selection_taken", TORCH_BOX(&selection_taken));
}

}  // namespace counterpoise

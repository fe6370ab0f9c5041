// Operators of the transport family on a GPU, of a cost whose kernel exists in rows only: the two halves of an
// iteration, and both. The schemas stand in counterpoise/kernels/transport.py.
#include "transport.cuh"

#include <tuple>

#include "device.h"
#include "transport_sides.cuh"

namespace counterpoise {
namespace {

using Optional = std::optional<Tensor>;

TransportTile tile(const Tensor& cost, const Optional& of_row, const Optional& of_column, const Tensor& g,
                   double epsilon) {
  const Type type = type_of(cost);
  STD_TORCH_CHECK(cost.dim() == 3, "a matrix of the transport family is (problems, rows, columns)");
  STD_TORCH_CHECK(type == Type::float32 || type == Type::float64, "transport is computed in float32 or float64");
  return {cost.const_data_ptr(), data_of(of_row), data_of(of_column), g.const_data_ptr(), cost.size(1), cost.size(2),
          epsilon, type};
}

std::tuple<Tensor, Tensor> transport_rows(const Tensor& cost, Optional of_row, Optional of_column, const Tensor& g,
                                          const Tensor& v, double epsilon) {
  const OnDevice device(cost);
  const TransportTile p = tile(cost, of_row, of_column, g, epsilon);
  const int64_t problems = cost.size(0);
  Tensor f = empty_as(cost, {problems, p.rows}, cost.scalar_type());
  Tensor r = empty_as(cost, {problems, p.rows}, cost.scalar_type());
  const auto run = p.type == Type::float64 ? cuda::transport_rows_on<double> : cuda::transport_rows_on<float>;
  run(p, problems, v.const_data_ptr(), f.mutable_data_ptr(), r.mutable_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {f, r};
}

Tensor transport_columns(const Tensor& cost, Optional of_row, Optional of_column, const Tensor& g, const Tensor& f,
                         const Tensor& u, double epsilon, bool logs) {
  const OnDevice device(cost);
  const TransportTile p = tile(cost, of_row, of_column, g, epsilon);
  const int64_t problems = cost.size(0), chunks = cuda::transport_chunks(p.rows, p.columns).count;
  Tensor s = empty_as(cost, {problems, p.columns}, cost.scalar_type());
  Tensor parts = empty_as(cost, {problems, chunks, p.columns, 2}, cost.scalar_type());
  const auto run = p.type == Type::float64 ? cuda::transport_columns_on<double> : cuda::transport_columns_on<float>;
  run(p, problems, f.const_data_ptr(), u.const_data_ptr(), logs, parts.mutable_data_ptr(), s.mutable_data_ptr(),
      device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return s;
}

// f, r, u and s: one half behind the other.
std::tuple<Tensor, Tensor, Tensor, Tensor> transport_sweep(const Tensor& cost, Optional of_row, Optional of_column,
                                                           const Tensor& g, const Tensor& v, const Tensor& mass,
                                                           const Tensor& reference, const Tensor& log_ratio,
                                                           Optional pull, double epsilon, bool logs) {
  const OnDevice device(cost);
  const TransportSide side{mass.const_data_ptr(), reference.const_data_ptr(), log_ratio.const_data_ptr(),
                           nullptr,               data_of(pull),              nullptr,
                           nullptr,               nullptr,                    cost.size(1)};
  auto [f, r] = transport_rows(cost, of_row, of_column, g, v, epsilon);
  Tensor u = torch::stable::empty_like(f);
  const auto run = type_of(cost) == Type::float64 ? cuda::transport_side_on<double> : cuda::transport_side_on<float>;
  run(side, cost.size(0), epsilon, logs, f.const_data_ptr(), r.const_data_ptr(), u.mutable_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor s = transport_columns(cost, of_row, of_column, g, f, u, epsilon, logs);
  return {f, r, u, s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("transport_columns", TORCH_BOX(&transport_columns));
  m.impl("transport_rows", TORCH_BOX(&transport_rows));
  m.impl("transport_sweep", TORCH_BOX(&transport_sweep));
}

}  // namespace counterpoise

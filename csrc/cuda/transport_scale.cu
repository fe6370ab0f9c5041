// Operators of the transport family on a GPU, of a matrix in memory: the iterations, what they start from and the plan
// behind them. The schemas stand in counterpoise/kernels/transport.py.
#include "transport_scale.cuh"

#include <tuple>

#include "device.h"

namespace counterpoise {
namespace {

using Optional = std::optional<Tensor>;

// Everything is contiguous and of one type; a batch of problems is flattened to one dimension.
cuda::TransportShape shape_of(const Tensor& matrix) {
  const Type type = type_of(matrix);
  STD_TORCH_CHECK(matrix.dim() == 3, "a matrix of the transport family is (problems, rows, columns)");
  STD_TORCH_CHECK(type == Type::float32 || type == Type::float64, "transport is computed in float32 or float64");
  return {matrix.size(0), matrix.size(1), matrix.size(2)};
}

Tensor transport_kernel(const Tensor& cost, const Tensor& f, const Tensor& g, double epsilon) {
  const OnDevice device(cost);
  const cuda::TransportShape shape = shape_of(cost);
  Tensor kernel = torch::stable::empty_like(cost);
  const auto run = type_of(cost) == Type::float64 ? cuda::transport_kernel_on<double> : cuda::transport_kernel_on<float>;
  run(shape, epsilon, cost.const_data_ptr(), f.const_data_ptr(), g.const_data_ptr(), kernel.mutable_data_ptr(),
      device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return kernel;
}

void transport_plan_(Tensor kernel, const Tensor& u, const Tensor& v) {
  const OnDevice device(kernel);
  const cuda::TransportShape shape = shape_of(kernel);
  const auto run = type_of(kernel) == Type::float64 ? cuda::transport_plan_on<double> : cuda::transport_plan_on<float>;
  run(shape, kernel.mutable_data_ptr(), u.const_data_ptr(), v.const_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// f, g and the largest finite C_ij - f_i of every problem.
std::tuple<Tensor, Tensor, Tensor> transport_start(const Tensor& cost, const Tensor& row_mass,
                                                   const Tensor& column_mass) {
  const OnDevice device(cost);
  const cuda::TransportShape p = shape_of(cost);
  const ScalarType type = cost.scalar_type();
  Tensor f = empty_as(cost, {p.problems, p.rows}, type), reach = empty_as(cost, {p.problems, p.rows}, type);
  Tensor g = empty_as(cost, {p.problems, p.columns}, type), spread = empty_as(cost, {p.problems}, ScalarType::Double);
  Tensor parts = empty_as(cost, {p.problems, cuda::transport_chunks(p.rows, p.columns).count, p.columns}, type);
  const auto run = type == ScalarType::Double ? cuda::transport_start_on<double> : cuda::transport_start_on<float>;
  run(p, cost.const_data_ptr(), row_mass.const_data_ptr(), column_mass.const_data_ptr(), parts.mutable_data_ptr(),
      reach.mutable_data_ptr(), f.mutable_data_ptr(), g.mutable_data_ptr(), spread.mutable_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {f, g, spread};
}

TransportSide side(const Tensor& mass, const Tensor& reference, const Tensor& log_ratio, const Optional& penalty,
                   const Optional& pull, const Optional& amount, bool bounded, Tensor& level, const Optional& log_exact) {
  return {mass.const_data_ptr(), reference.const_data_ptr(), log_ratio.const_data_ptr(),
          data_of(penalty),      data_of(pull),              data_of(amount),
          bounded ? level.mutable_data_ptr() : nullptr,      data_of(log_exact),
          mass.size(1)};
}

// f, g, u, v, s, r, and the ceilings of rows and columns, behind `count` iterations.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> transport_scale(
    const Tensor& kernel, const Tensor& f0, const Tensor& g0, const Tensor& v0, const Tensor& row_mass,
    const Tensor& row_reference, const Tensor& row_log_ratio, Optional row_penalty, Optional row_pull,
    Optional row_amount, Optional row_ceiling, Optional row_log_exact, const Tensor& column_mass,
    const Tensor& column_reference, const Tensor& column_log_ratio, Optional column_penalty, Optional column_pull,
    Optional column_amount, Optional column_ceiling, Optional column_log_exact, double shift_length, double epsilon,
    int64_t count) {
  const OnDevice device(kernel);
  const cuda::TransportShape shape = shape_of(kernel);
  const ScalarType type = kernel.scalar_type();
  const auto moved = [&](const Tensor& x) { return count > 0 ? torch::stable::empty_like(x) : torch::stable::clone(x); };
  const auto level = [&](const Optional& x) { return x ? torch::stable::clone(*x) : empty_as(kernel, {0}, type); };
  Tensor f = moved(f0), g = moved(g0), v = torch::stable::clone(v0);
  Tensor u = torch::stable::empty_like(f0), r = torch::stable::empty_like(f0), s = torch::stable::empty_like(g0);
  Tensor row_level = level(row_ceiling), column_level = level(column_ceiling);
  Tensor parts = empty_as(kernel, {cuda::transport_scale_room(shape)}, type);
  const TransportSide rows = side(row_mass, row_reference, row_log_ratio, row_penalty, row_pull, row_amount,
                                  row_ceiling.has_value(), row_level, row_log_exact);
  const TransportSide columns = side(column_mass, column_reference, column_log_ratio, column_penalty, column_pull,
                                     column_amount, column_ceiling.has_value(), column_level, column_log_exact);
  const auto run = type == ScalarType::Double ? cuda::transport_scale_on<double> : cuda::transport_scale_on<float>;
  run({kernel.const_data_ptr(), f0.const_data_ptr(), g0.const_data_ptr(), rows, columns, f.mutable_data_ptr(),
       g.mutable_data_ptr(), u.mutable_data_ptr(), v.mutable_data_ptr(), s.mutable_data_ptr(), r.mutable_data_ptr(),
       epsilon, shift_length, count, type_of(kernel)},
      shape.problems, parts.mutable_data_ptr(), device.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {f, g, u, v, s, r, row_level, column_level};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("transport_kernel", TORCH_BOX(&transport_kernel));
  m.impl("transport_plan_", TORCH_BOX(&transport_plan_));
  m.impl("transport_scale", TORCH_BOX(&transport_scale));
  m.impl("transport_start", TORCH_BOX(&transport_start));
}

}  // namespace counterpoise

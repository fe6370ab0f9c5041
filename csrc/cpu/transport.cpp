// Operators of the transport family; the schemas stand in counterpoise/kernels/transport.py.
#include "transport.h"

#include <tuple>

#include "tensors.h"

namespace counterpoise {
namespace {

using Optional = std::optional<Tensor>;

void team(int64_t blocks, void (*job)(void*, int64_t), void* argument) {
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) job(argument, begin);
  });
}

// Entry `problem` of a batch, rows of `size` numbers.
const void* at(const Tensor& x, int64_t problem, int64_t size) {
  return static_cast<const char*>(x.const_data_ptr()) + problem * size * x.element_size();
}
const void* at(const Optional& x, int64_t problem, int64_t size) { return x ? at(*x, problem, size) : nullptr; }
void* into(Tensor& x, int64_t problem, int64_t size) {
  return static_cast<char*>(x.mutable_data_ptr()) + problem * size * x.element_size();
}

// Everything is contiguous and of one type; a batch of problems is flattened to one dimension.
int64_t check(const Tensor& matrix) {
  const Type type = type_of(matrix);
  STD_TORCH_CHECK(matrix.dim() == 3, "a matrix of the transport family is (problems, rows, columns)");
  STD_TORCH_CHECK(type == Type::float32 || type == Type::float64, "transport is computed in float32 or float64");
  return matrix.size(0);
}

// Several problems at once where there are some, else the blocks of each: parallel loops do not nest.
template <class F>
void for_problems(int64_t problems, int64_t entries, const F& f) {
  constexpr int64_t small = 1 << 15;
  if (problems < 8 && entries > small) {
    for (int64_t b = 0; b < problems; ++b) f(b);
    return;
  }
  parallel(problems, entries > small ? 1 : small / (entries > 0 ? entries : 1), [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) f(begin);
  });
}

TransportTile tile(const Tensor& cost, const Optional& of_row, const Optional& of_column, const Tensor& g, int64_t b,
                   double epsilon) {
  const int64_t n = cost.size(1), k = cost.size(2);
  return {at(cost, b, n * k), at(of_row, b, n), at(of_column, b, k), at(g, b, k), n, k, epsilon, type_of(cost)};
}

// f and r of rows, from v.
std::tuple<Tensor, Tensor> transport_rows(const Tensor& cost, Optional of_row, Optional of_column, const Tensor& g,
                                          const Tensor& v, double epsilon) {
  const int64_t problems = check(cost), n = cost.size(1), k = cost.size(2);
  Tensor f = empty_as(cost, {problems, n}, cost.scalar_type()), r = empty_as(cost, {problems, n}, cost.scalar_type());
  for_problems(problems, n * k, [&](int64_t b) {
    const TransportSweep sweep{at(v, b, k), nullptr, false, into(f, b, n), into(r, b, n), nullptr, nullptr};
    CP_BEST(transport_table).sweep(tile(cost, of_row, of_column, g, b, epsilon), sweep, team);
  });
  return {f, r};
}

// s of columns, from f and u; or its logarithm, from that of u.
Tensor transport_columns(const Tensor& cost, Optional of_row, Optional of_column, const Tensor& g, const Tensor& f,
                         const Tensor& u, double epsilon, bool logs) {
  const int64_t problems = check(cost), n = cost.size(1), k = cost.size(2);
  Tensor s = empty_as(cost, {problems, k}, cost.scalar_type());
  for_problems(problems, n * k, [&](int64_t b) {
    const TransportSweep sweep{nullptr, nullptr, logs, const_cast<void*>(at(f, b, n)), nullptr,
                               const_cast<void*>(at(u, b, n)), into(s, b, k)};
    CP_BEST(transport_table).sweep(tile(cost, of_row, of_column, g, b, epsilon), sweep, team);
  });
  return s;
}

// f, r, u and s: both halves, with the cost read once.
std::tuple<Tensor, Tensor, Tensor, Tensor> transport_sweep(const Tensor& cost, Optional of_row, Optional of_column,
                                                           const Tensor& g, const Tensor& v, const Tensor& mass,
                                                           const Tensor& reference, const Tensor& log_ratio,
                                                           Optional pull, double epsilon, bool logs) {
  const int64_t problems = check(cost), n = cost.size(1), k = cost.size(2);
  const auto rows = [&] { return empty_as(cost, {problems, n}, cost.scalar_type()); };
  Tensor f = rows(), r = rows(), u = rows(), s = empty_as(cost, {problems, k}, cost.scalar_type());
  for_problems(problems, n * k, [&](int64_t b) {
    const TransportSide side{at(mass, b, n), at(reference, b, n), at(log_ratio, b, n), nullptr, data_of(pull),
                             nullptr,        nullptr,             nullptr,             n};
    const TransportSweep sweep{at(v, b, k), &side, logs, into(f, b, n), into(r, b, n), into(u, b, n), into(s, b, k)};
    CP_BEST(transport_table).sweep(tile(cost, of_row, of_column, g, b, epsilon), sweep, team);
  });
  return {f, r, u, s};
}

Tensor transport_kernel(const Tensor& cost, const Tensor& f, const Tensor& g, double epsilon) {
  const int64_t problems = check(cost), n = cost.size(1), k = cost.size(2);
  Tensor kernel = torch::stable::empty_like(cost);
  for_problems(problems, n * k, [&](int64_t b) {
    CP_BEST(transport_table)
        .kernel(tile(cost, std::nullopt, std::nullopt, g, b, epsilon), at(f, b, n), into(kernel, b, n * k), team);
  });
  return kernel;
}

void transport_plan_(Tensor kernel, const Tensor& u, const Tensor& v) {
  const int64_t problems = check(kernel), n = kernel.size(1), k = kernel.size(2);
  for_problems(problems, n * k, [&](int64_t b) {
    CP_BEST(transport_table).plan(into(kernel, b, n * k), at(u, b, n), at(v, b, k), n, k, type_of(kernel), team);
  });
}

// f, g and the largest finite C_ij - f_i of every problem.
std::tuple<Tensor, Tensor, Tensor> transport_start(const Tensor& cost, const Tensor& row_mass,
                                                   const Tensor& column_mass) {
  const int64_t problems = check(cost), n = cost.size(1), k = cost.size(2);
  Tensor f = empty_as(cost, {problems, n}, cost.scalar_type()), g = empty_as(cost, {problems, k}, cost.scalar_type());
  Tensor spread = empty_as(cost, {problems}, ScalarType::Double);
  for_problems(problems, n * k, [&](int64_t b) {
    static_cast<double*>(spread.mutable_data_ptr())[b] =
        CP_BEST(transport_table)
            .start(tile(cost, std::nullopt, std::nullopt, column_mass, b, 1.0), at(row_mass, b, n),
                   at(column_mass, b, k), into(f, b, n), into(g, b, k), team);
  });
  return {f, g, spread};
}

// f, g, u, v, s, r, and the ceilings of rows and columns, behind `count` iterations.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> transport_scale(
    const Tensor& kernel, const Tensor& f0, const Tensor& g0, const Tensor& v0, const Tensor& row_mass,
    const Tensor& row_reference, const Tensor& row_log_ratio, Optional row_penalty, Optional row_pull,
    Optional row_amount, Optional row_ceiling, Optional row_log_exact, const Tensor& column_mass,
    const Tensor& column_reference, const Tensor& column_log_ratio, Optional column_penalty, Optional column_pull,
    Optional column_amount, Optional column_ceiling, Optional column_log_exact, double shift_length, double epsilon,
    int64_t count) {
  const int64_t problems = check(kernel), n = kernel.size(1), k = kernel.size(2);
  Tensor f = torch::stable::clone(f0), g = torch::stable::clone(g0), v = torch::stable::clone(v0);
  Tensor u = torch::stable::empty_like(f0), r = torch::stable::empty_like(f0), s = torch::stable::empty_like(g0);
  Tensor row_level = row_ceiling ? torch::stable::clone(*row_ceiling) : empty_as(kernel, {0}, kernel.scalar_type());
  Tensor column_level = column_ceiling ? torch::stable::clone(*column_ceiling) : empty_as(kernel, {0}, kernel.scalar_type());
  for_problems(problems, n * k, [&](int64_t b) {
    const TransportSide rows{at(row_mass, b, n),
                             at(row_reference, b, n),
                             at(row_log_ratio, b, n),
                             data_of(row_penalty),
                             data_of(row_pull),
                             at(row_amount, b, 1),
                             row_ceiling ? into(row_level, b, 1) : nullptr,
                             at(row_log_exact, b, 1),
                             n};
    const TransportSide columns{at(column_mass, b, k),
                                at(column_reference, b, k),
                                at(column_log_ratio, b, k),
                                data_of(column_penalty),
                                data_of(column_pull),
                                at(column_amount, b, 1),
                                column_ceiling ? into(column_level, b, 1) : nullptr,
                                at(column_log_exact, b, 1),
                                k};
    CP_BEST(transport_table)
        .scale({at(kernel, b, n * k), at(f0, b, n), at(g0, b, k), rows, columns, into(f, b, n), into(g, b, k),
                into(u, b, n), into(v, b, k), into(s, b, k), into(r, b, n), epsilon, shift_length, count,
                type_of(kernel)},
               team);
  });
  return {f, g, u, v, s, r, row_level, column_level};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) {
  m.impl("transport_columns", TORCH_BOX(&transport_columns));
  m.impl("transport_kernel", TORCH_BOX(&transport_kernel));
  m.impl("transport_plan_", TORCH_BOX(&transport_plan_));
  m.impl("transport_rows", TORCH_BOX(&transport_rows));
  m.impl("transport_scale", TORCH_BOX(&transport_scale));
  m.impl("transport_start", TORCH_BOX(&transport_start));
  m.impl("transport_sweep", TORCH_BOX(&transport_sweep));
}

}  // namespace counterpoise

// Operators of the row-wise family; the schemas stand in counterpoise/kernels/rows.py.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "../math/rows.h"
#include "rows_problem.h"

namespace counterpoise {
namespace {

constexpr int64_t small_job = 1 << 13;  // entries that one thread does faster than several start

double number_at(const void* x, bool as_double, int64_t i) {
  return as_double ? static_cast<const double*>(x)[i] : static_cast<const float*>(x)[i];
}

// Looks at every label before anything is computed: which are bad, and what the mean will divide by.
double divisor_of(const RowProblem& p, const void* weight, Divisor kind, double number) {
  const bool as_double = p.logits_type == Type::float64;
  int64_t count = 0, foreground = 0;
  double total = 0;
  bool bad = false;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!row_counts(p, i)) continue;
    const int64_t y = p.target[i];
    if (y < 0 || y >= p.classes) {
      bad = true;
      continue;
    }
    ++count;
    foreground += y > 0;
    if (kind == Divisor::weight)
      total += (weight == nullptr ? 1.0 : number_at(weight, as_double, i)) *
               (p.class_weight == nullptr ? 1.0 : number_at(p.class_weight, as_double, y));
  }
  STD_TORCH_CHECK(!bad, "target holds a class index outside [0, ", p.classes - 1, "]");
  switch (kind) {
    case Divisor::count: return static_cast<double>(std::max<int64_t>(1, count));
    case Divisor::foreground: return static_cast<double>(std::max<int64_t>(1, foreground));
    case Divisor::weight: return total != 0 ? total : 1.0;
    default: return number;
  }
}

// Few and very long rows are split over threads, by size alone: the result is the same for every number of threads.
bool splits(const RowProblem& p) { return p.rows < 16 && p.classes >= 2 * row_piece; }

int64_t pieces_of(const RowProblem& p) { return (p.classes + row_piece - 1) / row_piece; }

template <class F>
void each_piece(const RowProblem& p, const F& f) {
  parallel(pieces_of(p), 1, [&](int64_t b, int64_t e) {
    for (; b < e; ++b) f(b, b * row_piece, std::min(p.classes, (b + 1) * row_piece));
  });
}

// The pieces brought to one top and added in order.
RowPiece total_of(const RowProblem& p, const std::vector<RowPiece>& pieces) {
  RowPiece all{-INFINITY, 0, 0, 0, 0, 0, 0};
  for (const auto& s : pieces) all.top = s.top > all.top ? s.top : all.top;
  for (const auto& s : pieces) {
    const double below = s.top - all.top;
    all.others += s.others * std::exp(below);
    all.gap += s.gap + (s.live > 0 ? (p.kind == static_cast<int>(math::RowKind::cross_entropy) ? s.live_weight : s.live) * below : 0);
    all.live += s.live;
    all.live_weight += s.live_weight;
    all.off_value += s.off_value;
    all.off_slope += s.off_slope;
  }
  return all;
}

void split_row(const RowProblem& p, int64_t row, void* losses, void* state) {
  const auto& table = CP_BEST(row_table);
  std::vector<RowPiece> pieces(pieces_of(p));
  each_piece(p, [&](int64_t i, int64_t from, int64_t to) { pieces[i] = table.sums(p, row, from, to); });
  RowPiece all = total_of(p, pieces);
  const double shift = all.top + table.log_total(p, row, all);
  each_piece(p, [&](int64_t i, int64_t from, int64_t to) { table.off(p, row, from, to, shift, pieces[i]); });
  table.outcome(p, row, total_of(p, pieces), losses, state);
}

// Blocks of rows for one thread each.
template <class F>
void each_block(const RowProblem& p, const F& f) {
  parallel(p.rows, std::max<int64_t>(1, small_job / std::max<int64_t>(1, p.classes)), f);
}

void split_backward(const RowProblem& p, int64_t row, const void* state, double factor, void* grad) {
  each_piece(p, [&](int64_t, int64_t from, int64_t to) {
    CP_BEST(row_table).slopes(p, row, from, to, state, factor, grad);
  });
}

// Losses and states of all rows, whose labels have been looked at.
void rows_into(const RowProblem& p, Tensor& losses, Tensor& state) {
  void *l = losses.mutable_data_ptr(), *s = state.mutable_data_ptr();
  if (!splits(p)) {
    each_block(p, [&](int64_t b, int64_t e) {
      CP_BEST(row_table).rows(p, b, e, nullptr, 1.0, l, s, nullptr, nullptr);
    });
    return;
  }
  torch::stable::zero_(losses);
  torch::stable::zero_(state);
  for (int64_t row = 0; row < p.rows; ++row)
    if (row_counts(p, row)) split_row(p, row, l, s);
}

void rows_each(CP_ROW_INPUTS, std::vector<double> settings, Tensor losses, Tensor state) {
  const RowProblem p = CP_ROW_PROBLEM;
  divisor_of(p, nullptr, Divisor::number, 1.0);
  rows_into(p, losses, state);
}

void rows_backward(CP_ROW_INPUTS, std::vector<double> settings, const Tensor& state, const Tensor& by_row,
                   Tensor grad) {
  const RowProblem p = CP_ROW_PROBLEM;
  const void *s = state.const_data_ptr(), *f = by_row.const_data_ptr();
  void* g = untouched(grad);
  if (splits(p)) {
    const bool as_double = p.logits_type == Type::float64;
    for (int64_t row = 0; row < p.rows; ++row) split_backward(p, row, s, number_at(f, as_double, row), g);
  } else {
    each_block(p, [&](int64_t b, int64_t e) { CP_BEST(row_table).backward(p, b, e, s, f, g); });
  }
}

double weighted_total(const RowProblem& p, const void* losses, const void* weight) {
  const bool as_double = p.logits_type == Type::float64;
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!row_counts(p, i)) continue;
    total += number_at(losses, as_double, i) * (weight == nullptr ? 1.0 : number_at(weight, as_double, i));
  }
  return total;
}

// The total, the states of the rows, and the factor of each in the total.
double total_and_state(const RowProblem& p, const void* w, double divisor, Tensor& state, Tensor& factor) {
  Tensor losses = empty_as(factor, {p.rows}, factor.scalar_type());
  rows_into(p, losses, state);
  const bool as_double = p.logits_type == Type::float64;
  for (int64_t i = 0; i < p.rows; ++i) {
    const double each = (w == nullptr ? 1.0 : number_at(w, as_double, i)) / divisor;
    if (as_double) {
      static_cast<double*>(factor.mutable_data_ptr())[i] = each;
    } else {
      static_cast<float*>(factor.mutable_data_ptr())[i] = static_cast<float>(each);
    }
  }
  return weighted_total(p, losses.const_data_ptr(), w) / divisor;
}

// Numbers that a thread keeps a row's exponentials in, where their place in the gradient is too narrow or streamed.
int64_t scratch_size(const RowProblem& p) {
  const bool narrow = p.logits_type == Type::bfloat16 || p.logits_type == Type::float16;
  return (narrow || row_streams(p)) && p.classes > row_chunk && p.classes <= row_kept ? p.classes : 0;
}

// The total with its gradient.
double total_and_gradient(const RowProblem& p, const void* w, double divisor, void* g) {
  std::vector<std::byte> losses(p.rows * (p.logits_type == Type::float64 ? sizeof(double) : sizeof(float)));
  if (splits(p)) {
    const bool as_double = p.logits_type == Type::float64;
    std::vector<std::byte> state(p.rows * row_state * sizeof(double));
    for (int64_t row = 0; row < p.rows; ++row) {
      if (row_counts(p, row)) split_row(p, row, losses.data(), state.data());
      split_backward(p, row, state.data(), (w == nullptr ? 1.0 : number_at(w, as_double, row)) / divisor, g);
    }
  } else {
    each_block(p, [&](int64_t b, int64_t e) {
      std::vector<double> scratch(scratch_size(p));  // or so many floats
      CP_BEST(row_table).rows(p, b, e, w, 1 / divisor, losses.data(), nullptr,
                              scratch.empty() ? nullptr : scratch.data(), g);
    });
  }
  return weighted_total(p, losses.data(), w) / divisor;
}

// With `grad` the gradient comes with the total; without it `state` and `factor` serve a backward pass.
void rows_total(CP_ROW_INPUTS, std::optional<Tensor> weight, std::vector<double> settings, Tensor value,
                std::optional<Tensor> state, std::optional<Tensor> factor, std::optional<Tensor> grad) {
  const RowProblem p = CP_ROW_PROBLEM;
  const void* w = data_of(weight);
  const double divisor = divisor_of(p, w, static_cast<Divisor>(static_cast<int>(settings[Normalizer])), settings[Number]);
  assign(value, grad ? total_and_gradient(p, w, divisor, untouched(*grad))
                     : total_and_state(p, w, divisor, *state, *factor));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) {
  m.impl("rows_backward", TORCH_BOX(&rows_backward));
  m.impl("rows_each", TORCH_BOX(&rows_each));
  m.impl("rows_total", TORCH_BOX(&rows_total));
}

}  // namespace counterpoise

// rows_total with a gradient, of what is asked for nearly always, without the dispatcher: for a small batch that takes
// longer than what is computed, as an argument takes longer than a row. 0, or 1 where the operator would raise an error.
extern "C" __attribute__((visibility("default"))) int counterpoise_rows_common(
    const void* logits, const int64_t* target, const void* additive, const void* margin, int64_t rows, int64_t classes,
    const double* formula, void* value, void* grad) try {
  using namespace counterpoise;
  enum { type, kind, scale, gamma, ignore_index, divided_by, number };  // in row_functions.py: _formula
  RowProblem p = {};
  p.logits = logits;
  p.logits_type = static_cast<Type>(static_cast<int>(formula[type]));
  p.target = target;
  p.additive = additive;
  p.margin = margin;
  p.rows = rows;
  p.classes = classes;
  p.ignore_index = static_cast<int64_t>(formula[ignore_index]);
  p.kind = static_cast<int>(formula[kind]);
  p.scale = formula[scale];
  p.gamma_pos = formula[gamma];
  const auto by = static_cast<Divisor>(static_cast<int>(formula[divided_by]));
  const double divisor = divisor_of(p, nullptr, by, formula[number]);
  const double total = total_and_gradient(p, nullptr, divisor, untouched(grad, rows * classes * logit_size(p)));
  if (p.logits_type == Type::float64) {
    *static_cast<double*>(value) = total;
  } else {
    *static_cast<float*>(value) = static_cast<float>(total);
  }
  return 0;
} catch (...) {
  return 1;
}

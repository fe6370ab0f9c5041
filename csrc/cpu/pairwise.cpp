// Operators of the pairwise family; the schemas stand in counterpoise/kernels/pair_tiles.py, which makes the products.
#include "pairwise_problem.h"

#include <algorithm>
#include <vector>

namespace counterpoise {
namespace {

constexpr int64_t small_job = 1 << 14;  // pairs that one thread does faster than several start

PairwiseTile narrow_enough(const PairwiseTile& p) {
  STD_TORCH_CHECK(p.columns <= pairwise_widest, "a tile has more columns than ", pairwise_widest);
  return p;
}

#define CP_TILE_PROBLEM narrow_enough(CP_PAIRWISE_TILE(int32_t))

template <class F>
void for_rows(const PairwiseTile& p, const F& f) {
  parallel(p.rows, std::max<int64_t>(1, small_job / std::max<int64_t>(1, p.columns)), f);
}

void pairwise_rows(CP_PAIRWISE_SETTINGS, const Tensor& top, const Tensor& total, std::optional<Tensor> dot,
                   std::optional<Tensor> similarity, std::optional<Tensor> mass, std::optional<Tensor> mean_key,
                   bool keep) {
  const PairwiseTile p = CP_TILE_PROBLEM;
  const PairwiseSums sums{top.mutable_data_ptr(), total.mutable_data_ptr(), place_of(dot), place_of(similarity),
                          place_of(mass), place_of(mean_key), mean_key ? mean_key->size(1) : 0, keep};
  for_rows(p, [&](int64_t b, int64_t e) { CP_BEST(pairwise_table).rows(p, sums, b, e); });
}

// Strips of columns are summed one by one, by row in their order.
template <class T>
void both_directions(const PairwiseTile& p, const PairwiseSums& sums) {
  const int64_t strips = (p.columns + pairwise_strip - 1) / pairwise_strip;
  std::vector<T> by_row(strips * 3 * p.rows);
  parallel(strips, std::max<int64_t>(1, small_job / std::max<int64_t>(1, p.rows * pairwise_strip)),
           [&](int64_t b, int64_t e) {
             for (; b < e; ++b)
               CP_BEST(pairwise_table).both(p, sums, b * pairwise_strip,
                                            std::min(p.columns, (b + 1) * pairwise_strip),
                                            by_row.data() + b * 3 * p.rows);
           });
  T* to[] = {static_cast<T*>(sums.total), static_cast<T*>(sums.similarity), static_cast<T*>(sums.mass)};
  for (int64_t strip = 0; strip < strips; ++strip)
    for (int kind = 0; kind < 3; ++kind) {
      if (to[kind] == nullptr) continue;
      const T* from = by_row.data() + (strip * 3 + kind) * p.rows;
      for (int64_t i = 0; i < p.rows; ++i) to[kind][p.first_row + i] += from[i];
    }
}

void pairwise_both(CP_PAIRWISE_SETTINGS, const Tensor& top, const Tensor& total, const Tensor& similarity,
                   std::optional<Tensor> mass) {
  const PairwiseTile p = CP_TILE_PROBLEM;
  STD_TORCH_CHECK(row + p.rows <= column, "a tile that is summed in both directions lies on the diagonal");
  const PairwiseSums sums{top.mutable_data_ptr(), total.mutable_data_ptr(), nullptr, similarity.mutable_data_ptr(),
                          place_of(mass), nullptr, 0, false};
  p.in_double ? both_directions<double>(p, sums) : both_directions<float>(p, sums);
}

void pairwise_slopes(CP_PAIRWISE_SETTINGS, const Tensor& log_sum, const Tensor& slope, std::optional<Tensor> bend,
                     std::optional<Tensor> middle, int64_t fixed, std::optional<Tensor> pull, bool mirrored,
                     bool bounded) {
  const PairwiseTile p = CP_TILE_PROBLEM;
  const PairwiseSlopes slopes{log_sum.const_data_ptr(), slope.const_data_ptr(), data_of(bend), data_of(middle), fixed,
                              data_of(pull), mirrored, bounded};
  for_rows(p, [&](int64_t b, int64_t e) { CP_BEST(pairwise_table).slopes(p, slopes, b, e); });
  if (mirrored && pull && index) CP_BEST(pairwise_table).pull_back(p, slopes);
}

void pairwise_sigmoid(CP_PAIRWISE_SETTINGS, const Tensor& bias, const Tensor& sums) {
  const PairwiseTile p = CP_TILE_PROBLEM;
  for_rows(p, [&](int64_t b, int64_t e) {
    CP_BEST(pairwise_table).sigmoid(p, bias.const_data_ptr(), sums.mutable_data_ptr(), b, e);
  });
}

void pairwise_sigmoid_slopes(CP_PAIRWISE_SETTINGS, const Tensor& bias, const Tensor& upstream, const Tensor& sums) {
  const PairwiseTile p = CP_TILE_PROBLEM;
  for_rows(p, [&](int64_t b, int64_t e) {
    CP_BEST(pairwise_table).sigmoid_slopes(p, bias.const_data_ptr(), upstream.const_data_ptr(),
                                           sums.mutable_data_ptr(), b, e);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) {
  m.impl("pairwise_both", TORCH_BOX(&pairwise_both));
  m.impl("pairwise_rows", TORCH_BOX(&pairwise_rows));
  m.impl("pairwise_sigmoid", TORCH_BOX(&pairwise_sigmoid));
  m.impl("pairwise_sigmoid_slopes", TORCH_BOX(&pairwise_sigmoid_slopes));
  m.impl("pairwise_slopes", TORCH_BOX(&pairwise_slopes));
}

}  // namespace counterpoise

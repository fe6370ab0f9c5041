// Operators of the pairwise family on a GPU; the schemas stand in counterpoise/kernels/pair_tiles.py.
#include "pairwise.cuh"

#include "../cpu/pairwise_problem.h"
#include "device.h"

namespace counterpoise {
namespace {

template <class F>
void in_type(const cuda::PairTile& p, const F& f) {
  p.in_double ? f(double()) : f(float());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void pairwise_rows(CP_PAIRWISE_SETTINGS, const Tensor& top, const Tensor& total, std::optional<Tensor> dot,
                   std::optional<Tensor> similarity, std::optional<Tensor> mass, std::optional<Tensor> mean_key,
                   bool keep) {
  const OnDevice device(products);
  const cuda::PairTile p = CP_PAIRWISE_TILE(int64_t);
  const PairwiseSums sums{top.mutable_data_ptr(), total.mutable_data_ptr(), place_of(dot), place_of(similarity),
                          place_of(mass), place_of(mean_key), mean_key ? mean_key->size(1) : 0, keep};
  in_type(p, [&](auto zero) { cuda::pairwise_rows_on<decltype(zero)>(p, sums, device.stream()); });
}

void pairwise_slopes(CP_PAIRWISE_SETTINGS, const Tensor& log_sum, const Tensor& slope, std::optional<Tensor> bend,
                     std::optional<Tensor> middle, int64_t fixed, std::optional<Tensor> pull, bool mirrored,
                     bool bounded) {
  STD_TORCH_CHECK(!bounded, "rows share no shift on a GPU");
  const OnDevice device(products);
  const cuda::PairTile p = CP_PAIRWISE_TILE(int64_t);
  const PairwiseSlopes slopes{log_sum.const_data_ptr(), slope.const_data_ptr(), data_of(bend), data_of(middle), fixed,
                              data_of(pull), mirrored, bounded};
  in_type(p, [&](auto zero) { cuda::pairwise_slopes_on<decltype(zero)>(p, slopes, device.stream()); });
}

void sigmoid(const cuda::PairTile& p, const Tensor& bias, const void* upstream, const Tensor& sums, void* stream) {
  in_type(p, [&](auto zero) {
    cuda::pairwise_sigmoid_on<decltype(zero)>(p, bias.const_data_ptr(), upstream, sums.mutable_data_ptr(), stream);
  });
}

void pairwise_sigmoid(CP_PAIRWISE_SETTINGS, const Tensor& bias, const Tensor& sums) {
  const OnDevice device(products);
  sigmoid(CP_PAIRWISE_TILE(int64_t), bias, nullptr, sums, device.stream());
}

void pairwise_sigmoid_slopes(CP_PAIRWISE_SETTINGS, const Tensor& bias, const Tensor& upstream, const Tensor& sums) {
  const OnDevice device(products);
  sigmoid(CP_PAIRWISE_TILE(int64_t), bias, upstream.const_data_ptr(), sums, device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CUDA, m) {
  m.impl("pairwise_rows", TORCH_BOX(&pairwise_rows));
  m.impl("pairwise_sigmoid", TORCH_BOX(&pairwise_sigmoid));
  m.impl("pairwise_sigmoid_slopes", TORCH_BOX(&pairwise_sigmoid_slopes));
  m.impl("pairwise_slopes", TORCH_BOX(&pairwise_slopes));
}

}  // namespace counterpoise

// The parts that all kernels share: reductions over warps, groups of lanes and blocks, packs, conversions.
#include "../../../csrc/cuda/block.cuh"

#include "files.h"

using namespace counterpoise::cuda;

namespace {

// Every thread writes what it was told, so that a lane that differs would be seen.
__global__ void reduce(const float* x, int64_t n, int lanes, float* sums, float* largest, float* log_sums,
                       float* grouped) {
  __shared__ Two<float> scratch_two[warp_size];
  __shared__ LogSum<float> scratch_log[warp_size];
  CP_DYNAMIC_SHARED(float, scratch);
  const int64_t place = grid_first();
  Two<float> sum{0, 0};
  LogSum<float> log_sum = Merge::none<LogSum<float>>();
  float high = Larger::none<float>();
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    sum = Add()(sum, Two<float>{x[i], 1});
    high = Larger()(high, x[i]);
    log_sum = Merge()(log_sum, LogSum<float>{x[i], 1});
  }
  const Two<float> all = block_reduce(sum, Add(), scratch_two);
  sums[2 * place] = all.first;
  sums[2 * place + 1] = all.second;
  largest[place] = block_reduce(high, Larger(), scratch);
  const LogSum<float> merged = block_reduce(log_sum, Merge(), scratch_log);
  log_sums[place] = merged.largest + counterpoise::math::log(merged.sum);
  grouped[place] = warp_reduce(static_cast<float>(threadIdx.x), Add(), lanes);
}

template <class S>
__global__ void copy(const S* from, S* to, int64_t n) {
  constexpr int width = pack_width<S>;
  for (int64_t at = grid_first() * width; at < n; at += grid_stride() * width) {
    computed_t<S> x[width];
    load_pack(from + at, x);
    store_pack(x, to + at);
  }
}

template <class S>
void copy_of(Folder& folder, const char* name, int64_t n) {
  const S* from = static_cast<const S*>(folder.read(name));
  launch(copy<S>, {2, 64, nullptr}, from, static_cast<S*>(folder.result(std::string(name) + "_copy", n * sizeof(S))), n);
}

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const int64_t blocks = 2, n = folder.whole("n"), threads = folder.whole("threads"), all = blocks * threads;
  auto room = [&](const char* name, int64_t count) {
    return static_cast<float*>(folder.result(name, count * sizeof(float)));
  };
  launch(reduce, {blocks, static_cast<int>(threads), nullptr, warp_size * int(sizeof(float))},
         static_cast<const float*>(folder.read("x")), n, static_cast<int>(folder.whole("lanes")),
         room("sums", 2 * all), room("largest", all), room("log_sums", all), room("grouped", all));
  const int64_t packed = folder.whole("packed");
  copy_of<float16>(folder, "half", packed);
  copy_of<bfloat16>(folder, "brain", packed);
  copy_of<double>(folder, "double", packed);
  folder.keep();
}

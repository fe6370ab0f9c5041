// Two mistakes on purpose, to show that the sanitizers see them: a barrier left out, and a write beside an array.
#include "../../../csrc/cuda/block.cuh"

#include <cstring>

using namespace counterpoise::cuda;

namespace {

__global__ void reversed(const float* x, float* y, bool barrier, int beside) {
  __shared__ float staged[64];
  const int i = threadIdx.x, n = blockDim.x;
  staged[i] = x[i];
  if (barrier) __syncthreads();
  y[i + beside] = staged[n - 1 - i];
}

}  // namespace

int main(int, char** arguments) {
  const std::vector<float> x(64, 1.0f);
  std::vector<float> y(64);
  const bool race = std::strcmp(arguments[1], "race") == 0, beside = std::strcmp(arguments[1], "beside") == 0;
  launch(reversed, {1, 64, nullptr}, x.data(), y.data(), !race, beside ? 1 : 0);
}

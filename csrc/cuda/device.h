// What an operator on a GPU does around its kernels: the device of its inputs, and torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../cpu/tensors.h"

namespace counterpoise {

// While it lives, the device of `x` is the current one.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Whether a block on this device may have so much dynamic shared memory.
inline bool has_shared_memory(const Tensor& x, int64_t bytes) {
  constexpr int others = 3 << 10;  // of the kernels themselves
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index());
  return bytes <= most - others;
}

}  // namespace counterpoise

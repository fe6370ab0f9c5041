// Memory of large gradients, used again. Fresh memory comes from the system page by page, each with a fault, and for a
// loss that only reads and writes that takes as long as the loss. What a step gives back is kept for the next, up to a
// limit; the oldest goes first.
#include <cstdlib>
#include <mutex>
#include <vector>

#include "tensors.h"

namespace counterpoise {
namespace {

constexpr size_t alignment = size_t(1) << 21;  // of a huge page
constexpr size_t mebibyte = size_t(1) << 20;

struct Block {
  void* data;
  size_t size;
};

size_t limit_from_environment() {
  const char* asked = std::getenv("COUNTERPOISE_CACHE_MIB");
  return (asked == nullptr ? 512 : std::strtoull(asked, nullptr, 10)) * mebibyte;
}

class Recycled {
 public:
  // A block that is given back, of at most twice the size, or a new one.
  Block take(size_t size) {
    const std::lock_guard<std::mutex> guard(lock_);
    for (size_t i = kept_.size(); i-- > 0;) {
      if (kept_[i].size < size || kept_[i].size / 2 > size) continue;
      const Block found = kept_[i];
      kept_.erase(kept_.begin() + i);
      total_ -= found.size;
      return found;
    }
    const size_t whole = (size + alignment - 1) / alignment * alignment;
    void* data = std::aligned_alloc(alignment, whole);
    STD_TORCH_CHECK(data != nullptr, "not enough memory: a gradient needs ", size, " bytes");
    return {data, whole};
  }

  void give(const Block& block) {
    const std::lock_guard<std::mutex> guard(lock_);
    kept_.push_back(block);
    total_ += block.size;
    shrink_to(limit_);
  }

  void clear() {
    const std::lock_guard<std::mutex> guard(lock_);
    shrink_to(0);
  }

 private:
  void shrink_to(size_t most) {
    size_t gone = 0;
    for (; total_ > most; ++gone) {
      total_ -= kept_[gone].size;
      std::free(kept_[gone].data);
    }
    kept_.erase(kept_.begin(), kept_.begin() + gone);
  }

  std::mutex lock_;
  std::vector<Block> kept_;  // the oldest first
  size_t total_ = 0;
  const size_t limit_ = limit_from_environment();
};

// Never destroyed: tensors may outlive everything else.
Recycled& recycled() {
  static auto* all = new Recycled;
  return *all;
}

// Uninitialised memory of the shape and type of x, which is contiguous.
Tensor gradient_like(const Tensor& x) {
  const Block block = recycled().take(x.numel() * x.element_size());
  return torch::stable::from_blob(block.data, x.sizes(), x.strides(), x.device(), x.scalar_type(),
                                  [block](void*) { recycled().give(block); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(counterpoise, CPU, m) { m.impl("gradient_like", TORCH_BOX(&gradient_like)); }

}  // namespace counterpoise

extern "C" __attribute__((visibility("default"))) void counterpoise_empty_cache() {
  counterpoise::recycled().clear();
}

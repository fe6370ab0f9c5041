// Between torch's stable interface and the plain structures that the loops are given.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "capability.h"

namespace counterpoise {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Type::uint8;
    case ScalarType::Long: return Type::int64;
    default: STD_TORCH_CHECK(false, "counterpoise: unsupported element type");
  }
}

// The type in which a problem with these logits is computed.
inline ScalarType computed_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_as(const Tensor& x, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape), type);
}

// Before a gradient is first written: a large one is fresh memory from the system, and in huge pages its first touch
// costs a hundredth of the page faults, which would take longer than what is computed. Advice only, and only inside it.
inline void* untouched(void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto end = (begin + bytes) / page * page, first = (begin + page - 1) / page * page;
  if (end > first + page) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  return data;
}

inline void* untouched(Tensor& grad) {
  return untouched(grad.mutable_data_ptr(), grad.numel() * static_cast<int64_t>(grad.element_size()));
}

inline const void* data_of(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

// A scalar tensor of the type that is computed in.
inline void assign(Tensor& x, double value) {
  if (x.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(x.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(x.mutable_data_ptr()) = static_cast<float>(value);
  }
}

// f(begin, end) over [0, n) in torch's own thread pool; small jobs stay in the calling thread.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= grain) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace counterpoise

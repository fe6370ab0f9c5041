// The element-wise family: one operator on the inputs of a folder.
#include "../../../csrc/cuda/binary_both.cuh"

#include "files.h"

using namespace counterpoise;

namespace {

BinaryProblem problem(Folder& in) {
  return {in.read("logits"),
          in.read("target"),
          static_cast<const uint8_t*>(in.read("mask")),
          in.read("entry_weight"),
          in.read("positive_weight"),
          static_cast<Type>(in.whole("logits_type")),
          static_cast<Type>(in.whole("target_type")),
          in.whole("mask_by_entry") != 0,
          in.whole("rows"),
          in.whole("row"),
          static_cast<int>(in.whole("kind")),
          in.number("gamma_pos"),
          in.number("gamma_neg"),
          in.number("alpha_pos"),
          in.number("alpha_neg"),
          in.number("margin"),
          in.number("log_eps"),
          in.number("beta"),
          in.whole("detach") != 0};
}

template <class S>
void run(Folder& folder, const BinaryProblem& p) {
  using T = cuda::computed_t<S>;
  const bool mean = folder.whole("mean") != 0;
  const void* weight = folder.read("weight");
  void* sums = folder.result("sums", p.rows * sizeof(T));
  void* counts = folder.result("counts", p.rows * sizeof(T));
  cuda::binary_rows_on<S>(p, sums, counts, nullptr);

  std::vector<cuda::Two<double>> partials(cuda::binary_partials);
  void* divided_by = folder.result("divided_by", sizeof(T));
  cuda::binary_total_on<S>(p,
                           {weight, mean, folder.number("divisor"), partials.data(),
                            folder.result("total", sizeof(T)), divided_by},
                           nullptr);
  cuda::binary_grad_on<S>(p, weight, folder.read("upstream"), divided_by, mean,
                          folder.result("grad", p.rows * p.row * sizeof(S)), nullptr);
  cuda::binary_grad_on<S>(p, folder.read("by_row"), nullptr, nullptr, false,
                          folder.result("grad_rows", p.rows * p.row * sizeof(S)), nullptr);
  if (p.mask != nullptr || p.entry_weight != nullptr || weight != nullptr) return;

  auto* divided = static_cast<T*>(folder.result("both_divided_by", 2 * sizeof(T)));
  void* grad = folder.result("both_grad", p.rows * p.row * sizeof(S));
  cuda::binary_both_on<S>(
      p, {nullptr, mean, folder.number("divisor"), partials.data(), folder.result("both_total", sizeof(T)), divided}, grad,
      nullptr);
  cuda::binary_grad_on<S>(p, nullptr, folder.read("both_upstream"), divided, mean, grad, nullptr, divided + 1);
}

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const BinaryProblem p = problem(folder);
  switch (p.logits_type) {
#if !defined(FLOAT_ALONE)
    case Type::float64: run<double>(folder, p); break;
    case Type::bfloat16: run<cuda::bfloat16>(folder, p); break;
    case Type::float16: run<cuda::float16>(folder, p); break;
#endif
    default: run<float>(folder, p);
  }
  folder.keep();
}

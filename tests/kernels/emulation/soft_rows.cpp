// The row-wise family with distributions as targets: one problem of a folder.
#include "../../../csrc/cuda/kept_soft_rows.cuh"

#include "files.h"

using namespace counterpoise;

namespace {

SoftRowProblem problem(Folder& in) {
  return {in.read("logits"),
          in.read("target"),
          static_cast<Type>(in.whole("logits_type")),
          static_cast<Type>(in.whole("target_type")),
          static_cast<const uint8_t*>(in.read("mask")),
          in.read("multiplicative"),
          in.read("additive"),
          in.read("margin"),
          in.read("class_weight"),
          in.whole("rows"),
          in.whole("classes"),
          in.whole("divergence") != 0,
          in.number("scale"),
          in.number("smoothing"),
          in.number("target_scale")};
}

template <class S, class Y>
void run(Folder& folder, const SoftRowProblem& p) {
  using T = cuda::computed_t<S>;
  void* losses = folder.result("losses", p.rows * sizeof(T));
  std::vector<T> state(p.rows * soft_row_state);
  cuda::soft_rows_forward_on<S, Y>(p, losses, state.data(), nullptr);

  std::vector<double> partials(2 * cuda::row_partials + 1);
  void* factor = folder.result("factor", p.rows * sizeof(T));
  cuda::soft_rows_total_on<T>(p, losses, folder.read("weight"), static_cast<int>(folder.whole("divisor")),
                              folder.number("number"), partials.data(), folder.result("total", sizeof(T)), factor,
                              nullptr);
  cuda::soft_rows_gradient_on<S, Y>(p, state.data(), factor,
                                    folder.result("grad", p.rows * p.classes * sizeof(S)), nullptr);

  cuda::kept_soft_rows_on<S, Y>(p, folder.read("weight"), static_cast<int>(folder.whole("divisor")),
                                folder.number("number"), partials.data(),
                                folder.result("kept_losses", p.rows * sizeof(T)),
                                folder.result("kept_total", sizeof(T)),
                                folder.result("kept_grad", p.rows * p.classes * sizeof(S)), nullptr);
}

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const SoftRowProblem p = problem(folder);
#if defined(FLOAT_ALONE)
  run<float, float>(folder, p);
#else
  cuda::with_soft_types(p, [&](auto* s, auto* y) { run<cuda::Stored<decltype(s)>, cuda::Stored<decltype(y)>>(folder, p); });
#endif
  folder.keep();
}

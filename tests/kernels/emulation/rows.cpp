// The row-wise family: one problem of a folder, by the forward and backward pass and by both at once.
#include "../../../csrc/cuda/kept_rows.cuh"

#include "files.h"

using namespace counterpoise;

namespace {

RowProblem problem(Folder& in) {
  return {in.read("logits"),
          static_cast<Type>(in.whole("logits_type")),
          static_cast<const int64_t*>(in.read("target")),
          static_cast<const uint8_t*>(in.read("mask")),
          in.read("additive"),
          in.read("multiplicative"),
          in.read("margin"),
          in.read("class_weight"),
          in.whole("rows"),
          in.whole("classes"),
          in.whole("ignore_index"),
          static_cast<int>(in.whole("kind")),
          in.number("scale"),
          in.number("smoothing"),
          in.number("gamma_pos"),
          in.number("gamma_neg"),
          in.whole("detach") != 0};
}

template <class S>
void run(Folder& folder, const RowProblem& p) {
  using T = cuda::computed_t<S>;
  const void* weight = folder.read("weight");
  const int divisor = static_cast<int>(folder.whole("divisor"));
  const double number = folder.number("number");
  std::vector<double> partials(2 * cuda::row_partials + 1);

  void* losses = folder.result("losses", p.rows * sizeof(T));
  std::vector<T> state(p.rows * row_state), factor(p.rows);
  cuda::rows_forward_on<S>(p, losses, state.data(), nullptr);
  cuda::rows_total_on<S>(p, losses, weight, divisor, number, partials.data(), folder.result("total", sizeof(T)),
                         factor.data(), nullptr);
  cuda::rows_gradient_on<S>(p, state.data(), factor.data(), folder.result("grad", p.rows * p.classes * sizeof(S)),
                            nullptr);

  void* grad = folder.result("kept_grad", p.rows * p.classes * sizeof(S));
  cuda::kept_rows_on<S>(p, weight, divisor, number, partials.data(), folder.result("kept_losses", p.rows * sizeof(T)),
                        folder.result("kept_total", sizeof(T)), grad, nullptr);
  const T upstream = static_cast<T>(folder.number("upstream"));
  cuda::scale_gradient_on<S>(grad, p.rows * p.classes, &upstream, nullptr);
}

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const RowProblem p = problem(folder);
#if defined(FLOAT_ALONE)
  run<float>(folder, p);
#else
  cuda::with_float_type(p.logits_type, [&](auto* s) { run<cuda::Stored<decltype(s)>>(folder, p); });
#endif
  folder.keep();
}

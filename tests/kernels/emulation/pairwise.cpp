// The pairwise family: one operator on a tile of products from a folder.
#include "../../../csrc/cuda/pairwise.cuh"

#include <algorithm>

#include "files.h"

using namespace counterpoise;

namespace {

template <class T>
void* changed(Folder& folder, const std::string& name, int64_t count) {
  const void* given = folder.read(name);
  if (given == nullptr) return nullptr;
  void* room = folder.result("new_" + name, count * sizeof(T));
  std::copy_n(static_cast<const T*>(given), count, static_cast<T*>(room));
  return room;
}

template <class T>
void run(Folder& folder, cuda::PairTile p) {
  const int64_t n = folder.whole("queries"), width = folder.whole("width");
  p.products = changed<T>(folder, "products", p.rows * p.columns);
  switch (folder.whole("operator")) {
    case 0: {
      const PairwiseSums sums{changed<T>(folder, "top", n),        changed<T>(folder, "total", n),
                              changed<T>(folder, "dot", n),        changed<T>(folder, "similarity", n),
                              changed<T>(folder, "mass", n),       changed<T>(folder, "mean_key", n * width), width,
                              folder.whole("keep") != 0};
      return cuda::pairwise_rows_on<T>(p, sums, nullptr);
    }
    case 1: {
      const PairwiseSlopes slopes{folder.read("log_sum"), folder.read("slope"),
                                  folder.read("bend"),    folder.read("middle"),
                                  folder.whole("fixed"),  folder.read("pull"),
                                  folder.whole("mirrored") != 0, false};
      return cuda::pairwise_slopes_on<T>(p, slopes, nullptr);
    }
    default:
      cuda::pairwise_sigmoid_on<T>(p, folder.read("bias"), folder.read("upstream"), changed<T>(folder, "sums", n),
                                   nullptr);
  }
}

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const int64_t n = folder.whole("queries"), m = folder.whole("keys");
  const auto* q = static_cast<const int64_t*>(folder.read("query_ids"));
  const auto* k = static_cast<const int64_t*>(folder.read("key_ids"));
  const cuda::PairTile p{nullptr,
                         folder.whole("in_double") != 0,
                         folder.whole("rows"),
                         folder.whole("columns"),
                         folder.whole("row"),
                         folder.whole("column"),
                         static_cast<int>(folder.whole("positive")),
                         static_cast<int>(folder.whole("candidate")),
                         q,
                         q == nullptr ? nullptr : q + n,
                         k,
                         k == nullptr ? nullptr : k + m,
                         static_cast<const int64_t*>(folder.read("index")),
                         folder.read("probability"),
                         folder.whole("positives"),
                         static_cast<const int64_t*>(folder.read("itself")),
                         folder.read("log_weight"),
                         folder.number("sharpness")};
#if !defined(FLOAT_ALONE)
  if (p.in_double) run<double>(folder, p);
#endif
  if (!p.in_double) run<float>(folder, p);
  folder.keep();
}

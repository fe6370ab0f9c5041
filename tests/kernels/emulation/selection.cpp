// Selection: distances of the pairs of a folder.
#include "../../../csrc/cuda/selection.cuh"

#include "files.h"

using namespace counterpoise;

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const cuda::SelectionPairs pairs = {static_cast<const double*>(folder.read("x")),
                                      static_cast<const int64_t*>(folder.read("rows")),
                                      static_cast<const double*>(folder.read("centres")),
                                      static_cast<const int64_t*>(folder.read("which")),
                                      folder.whole("count"),
                                      folder.whole("width")};
  auto* out = static_cast<double*>(folder.result("out", pairs.count * sizeof(double)));
  cuda::selection_distances_on(pairs, out, nullptr);
  folder.keep();
}

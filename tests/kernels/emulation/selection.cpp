// Selection: runs the operator that the folder's numbers name, with so many threads to a block.
#include "../../../csrc/cuda/selection.cuh"
#include "../../../csrc/cuda/selection_nearest.cuh"
#include "../../../csrc/cuda/selection_taken.cuh"

#include "files.h"

using namespace counterpoise;

namespace {

template <class T>
const T* array(Folder& folder, const char* name) {
  return static_cast<const T*>(folder.read(name));
}

// A result that begins as an array of the folder.
template <class T>
T* changed(Folder& folder, const char* name, int64_t size) {
  auto* to = static_cast<T*>(folder.result(name, size * sizeof(T)));
  if (const T* from = array<T>(folder, name)) std::copy(from, from + size, to);
  return to;
}

void distances(Folder& folder) {
  const cuda::SelectionPairs pairs = {array<double>(folder, "x"),       array<int64_t>(folder, "rows"),
                                      array<double>(folder, "centres"), array<int64_t>(folder, "which"),
                                      folder.whole("count"),            folder.whole("width")};
  auto* out = static_cast<double*>(folder.result("out", pairs.count * sizeof(double)));
  cuda::selection_distances_on(pairs, out, nullptr);
}

void follow(Folder& folder) {
  const int64_t count = folder.whole("count"), most = folder.whole("most");
  const Leaders leaders = {array<double>(folder, "points"),
                           array<int64_t>(folder, "index"),
                           changed<double>(folder, "distance", count),
                           count,
                           folder.whole("width"),
                           folder.number("bound"),
                           folder.whole("bound_index")};
  cuda::selection_follow_on(leaders, most, changed<int64_t>(folder, "picks", most), changed<double>(folder, "gaps", most),
                            changed<int64_t>(folder, "found", 1), nullptr, static_cast<int>(folder.whole("threads")));
}

void taken(Folder& folder) {
  const cuda::TakenTile p = {array<double>(folder, "tile"),  array<double>(folder, "before"),
                             array<double>(folder, "after"), folder.whole("rows"),
                             folder.whole("columns"),        folder.number("rounding")};
  cuda::selection_taken_on(p, changed<double>(folder, "out", p.columns), nullptr);
}

template <class T>
void nearest(Folder& folder) {
  const int64_t queries = folder.whole("queries"), count = folder.whole("count"), parts = folder.whole("parts");
  const CostRows rows = {folder.read("costs"),  sizeof(T) == 8 ? Type::float64 : Type::float32,
                         folder.whole("columns"), folder.whole("start"),
                         count,                   folder.number("first") != 0};
  const int64_t room = parts > 1 ? queries * parts * count : 0;
  cuda::selection_nearest_on<T>(rows, queries, parts, folder.result("near_of_parts", room * sizeof(T)),
                                static_cast<int64_t*>(folder.result("keys_of_parts", room * sizeof(int64_t))),
                                changed<T>(folder, "near", queries * count),
                                changed<int64_t>(folder, "keys", queries * count), nullptr,
                                static_cast<int>(folder.whole("threads")));
}

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  switch (folder.whole("operator")) {
    case 0: distances(folder); break;
    case 1: follow(folder); break;
    case 2: taken(folder); break;
    case 3: nearest<float>(folder); break;
    case 4: nearest<double>(folder); break;
  }
  folder.keep();
}

// The transport family: both halves of an iteration on the inputs of a folder.
#include "../../../csrc/cuda/transport.cuh"

#include "files.h"

using namespace counterpoise;

namespace {

template <class T>
void run(Folder& folder, const TransportTile& p, int64_t problems) {
  void* f = folder.result("f", problems * p.rows * sizeof(T));
  cuda::transport_rows_on<T>(p, problems, folder.read("v"), f,
                             folder.result("r", problems * p.rows * sizeof(T)), nullptr);
  std::vector<T> parts(2 * problems * cuda::transport_chunks(p.rows, p.columns).count * p.columns);
  for (const bool logs : {false, true})
    cuda::transport_columns_on<T>(p, problems, f, folder.read(logs ? "log_u" : "u"), logs, parts.data(),
                                  folder.result(logs ? "log_s" : "s", problems * p.columns * sizeof(T)), nullptr);
}

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const TransportTile p = {folder.read("cost"),    folder.read("of_row"),
                           folder.read("of_column"), folder.read("g"),
                           folder.whole("rows"),   folder.whole("columns"),
                           folder.number("epsilon"), static_cast<Type>(folder.whole("type"))};
  if (p.type == Type::float64) {
    run<double>(folder, p, folder.whole("problems"));
  } else {
    run<float>(folder, p, folder.whole("problems"));
  }
  folder.keep();
}

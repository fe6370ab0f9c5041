// The transport family with a matrix in memory: where the iterations start, the kernel, the iterations, the plan; and
// the side between both halves of a sweep. `what` says which of them a folder asks for.
#include "../../../csrc/cuda/transport_scale.cuh"

#include "files.h"

using namespace counterpoise;

namespace {

template <class T>
struct Runs {
  Folder& folder;
  cuda::TransportShape shape;
  double epsilon;

  void* result(const char* name, int64_t n) { return folder.result(name, n * sizeof(T)); }

  void start() {
    std::vector<T> parts(shape.problems * cuda::transport_chunks(shape.rows, shape.columns).count * shape.columns);
    std::vector<T> reach(shape.problems * shape.rows);
    const void* cost = folder.read("cost");
    void *f = result("f", shape.problems * shape.rows), *g = result("g", shape.problems * shape.columns);
    void* spread = folder.result("spread", shape.problems * sizeof(double));
    cuda::transport_start_on<T>(shape, cost, folder.read("row_mass"), folder.read("column_mass"), parts.data(),
                                reach.data(), f, g, spread, nullptr);
  }

  void plan() {
    void* kernel = result("kernel", shape.entries());
    cuda::transport_kernel_on<T>(shape, epsilon, folder.read("cost"), folder.read("f"), folder.read("g"), kernel,
                                 nullptr);
    void* plan = result("plan", shape.entries());
    std::memcpy(plan, kernel, shape.entries() * sizeof(T));
    cuda::transport_plan_on<T>(shape, plan, folder.read("u"), folder.read("v"), nullptr);
  }

  TransportSide side(const std::string& name, int64_t size) {
    const auto of = [&](const char* what) { return folder.read(name + "_" + what); };
    void* ceiling = nullptr;
    if (const void* before = of("ceiling")) {
      ceiling = result((name + "_level").c_str(), shape.problems);
      std::memcpy(ceiling, before, shape.problems * sizeof(T));
    }
    return {of("mass"), of("reference"), of("log_ratio"), of("penalty"), of("pull"),
            of("amount"), ceiling, of("log_exact"), size};
  }

  void scale() {
    const int64_t n = shape.problems * shape.rows, k = shape.problems * shape.columns;
    void* v = result("v", k);
    std::memcpy(v, folder.read("v0"), k * sizeof(T));
    const TransportScalings p{folder.read("matrix"),
                              folder.read("f0"),
                              folder.read("g0"),
                              side("row", shape.rows),
                              side("column", shape.columns),
                              result("f", n),
                              result("g", k),
                              result("u", n),
                              v,
                              result("s", k),
                              result("r", n),
                              epsilon,
                              folder.number("shift_length"),
                              folder.whole("count"),
                              static_cast<Type>(folder.whole("type"))};
    iterate(p);
  }

  // As the shape alone has it, or in the form that is asked for.
  void iterate(const TransportScalings& p) {
    std::vector<T> parts(shape.problems * cuda::transport_chunks(shape.rows, shape.columns).count * shape.columns);
    const int64_t form = folder.whole("form");
    if (form == 0) {
      std::vector<T> room(cuda::transport_scale_room(shape));
      cuda::transport_scale_on<T>(p, shape.problems, room.data(), nullptr);
    } else if (form == 1) {
      cuda::transport_turns_on(cuda::scalings_of<T>(p, shape.problems), p.count, parts.data(), nullptr);
    } else {
      cuda::transport_problems_on(cuda::scalings_of<T>(p, shape.problems), p.count, nullptr);
    }
  }

  void scaled() {
    const TransportSide rows = side("row", shape.rows);
    for (const bool logs : {false, true})
      cuda::transport_side_on<T>(rows, shape.problems, epsilon, logs, folder.read("f"), folder.read("r"),
                                 result(logs ? "log_u" : "u", shape.problems * shape.rows), nullptr);
  }

  void run(int64_t what) { what == 0 ? start() : what == 1 ? plan() : what == 2 ? scale() : scaled(); }
};

}  // namespace

int main(int, char** arguments) {
  Folder folder(arguments[1]);
  const cuda::TransportShape shape = {folder.whole("problems"), folder.whole("rows"), folder.whole("columns")};
  const double epsilon = folder.number("epsilon");
  if (static_cast<Type>(folder.whole("type")) == Type::float64) {
    Runs<double>{folder, shape, epsilon}.run(folder.whole("what"));
  } else {
    Runs<float>{folder, shape, epsilon}.run(folder.whole("what"));
  }
  folder.keep();
}

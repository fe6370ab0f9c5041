// Chooses the best instruction set that this machine has.
#include <cstdlib>
#include <cstring>

#include "capability.h"

namespace counterpoise {

static Capability of_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::avx512 : (avx2 ? Capability::avx2 : Capability::baseline);
#else
  return Capability::baseline;
#endif
}

// What is asked for may be less than what there is, never more.
static Capability choose() {
  const Capability best = of_machine();
  const char* asked = std::getenv("COUNTERPOISE_CPU_CAPABILITY");
  if (asked == nullptr) return best;
  const Capability wanted = std::strcmp(asked, "baseline") == 0 ? Capability::baseline
                            : std::strcmp(asked, "avx2") == 0   ? Capability::avx2
                                                                : Capability::avx512;
  return wanted < best ? wanted : best;
}

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace counterpoise

extern "C" __attribute__((visibility("default"))) const char* counterpoise_cpu_capability() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(counterpoise::capability())];
}

// What the loops of one instruction set and the operators share, and the choice between instruction sets.
//
// arch/*.cpp is compiled once for each instruction set, in a namespace of its own and without any torch header, so that
// no inline function compiled for one machine can be linked into the code for another. A family's header declares its
// plain structures and its table of functions; its operators take the table by CP_BEST.
#pragma once

#include <cstdint>

namespace counterpoise {

enum class Type : int { float32, float64, bfloat16, float16, uint8, int64 };

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2 };

Capability capability();  // that of this machine, or the lesser one that COUNTERPOISE_CPU_CAPABILITY names

}  // namespace counterpoise

#if defined(__x86_64__)
#define CP_DECLARE_TABLE(Table, name)             \
  namespace baseline { extern const Table name; } \
  namespace avx2 { extern const Table name; }     \
  namespace avx512 { extern const Table name; }
#define CP_BEST(name)                                             \
  (capability() == Capability::avx512 ? avx512::name              \
                                      : capability() == Capability::avx2 ? avx2::name : baseline::name)
#else
#define CP_DECLARE_TABLE(Table, name) \
  namespace baseline { extern const Table name; }
#define CP_BEST(name) (baseline::name)
#endif

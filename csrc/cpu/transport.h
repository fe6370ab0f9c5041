// Transport family: what the loops are given and what they offer.
//
// Matrices are cut into blocks of rows whose number does not depend on threads; what is summed over rows is summed in
// every block for itself, and over blocks in their order.
#pragma once

#include "capability.h"

namespace counterpoise {

// Calls job(argument, block) for every block, in several threads; tells nothing of torch to the loops.
using TransportTeam = void (*)(int64_t blocks, void (*job)(void* argument, int64_t block), void* argument);

// One side of one problem, (size) each; see counterpoise/ot/_sides.py.
struct TransportSide {
  const void *mass, *reference, *log_ratio;
  const void *penalty, *pull;  // null = exact
  const void* amount;          // one number, null = no ceiling
  void* ceiling;               // one number that is moved
  const void* log_exact;       // of the common shift: one number, null = no shift
  int64_t size;
};

// Alternating scalings of a kernel in memory, with potentials f0 and g0 absorbed.
struct TransportScalings {
  const void *kernel, *f0, *g0;
  TransportSide rows, columns;
  void *f, *g, *u, *v, *s, *r;  // v is read as well
  double epsilon, shift_length;
  int64_t count;
  Type type;
};

// A cost whose kernel exists in rows only: exp((g_j - C_ij + f_i) / epsilon).
struct TransportTile {
  const void* cost;                 // (rows, columns)
  const void *of_row, *of_column;   // what is added to a product of points, null = the cost is given
  const void* g;                    // (columns), minus infinity where there is no mass
  int64_t rows, columns;
  double epsilon;
  Type type;
};

// What is asked of a tile.
struct TransportSweep {
  const void* v;              // (columns): f and r are wanted; null = f is given
  const TransportSide* side;  // u follows from r; null = u is given, if s is wanted
  bool logs;                  // u and s are logarithms
  void *f, *r, *u, *s;        // s null = not wanted
};

struct TransportTable {
  void (*scale)(const TransportScalings&, TransportTeam);
  void (*sweep)(const TransportTile&, const TransportSweep&, TransportTeam);
  void (*kernel)(const TransportTile&, const void* f, void* out, TransportTeam);
  void (*plan)(void* kernel, const void* u, const void* v, int64_t rows, int64_t columns, Type, TransportTeam);
  // f_i = min_j C_ij, g_j = min_i C_ij - f_i over entries with mass; returns the largest C_ij - f_i that is finite.
  double (*start)(const TransportTile&, const void* row_mass, const void* column_mass, void* f, void* g, TransportTeam);
};

CP_DECLARE_TABLE(TransportTable, transport_table)

}  // namespace counterpoise

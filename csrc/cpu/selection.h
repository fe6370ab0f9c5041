// Selection: distances of points in double precision, and farthest-first picks among a few of them.
#pragma once

#include "capability.h"

namespace counterpoise {

// Points that are followed pick by pick, (count, width).
struct Leaders {
  const double* points;
  const int64_t* index;  // (count) of the points among all
  double* distance;      // (count) to the nearest pick; exact above the bound
  int64_t count, width;
  double bound;          // the largest distance of all other points, and the lowest index that has it
  int64_t bound_index;
};

struct SelectionTable {
  // out_i = |x_rows(i) - centre_which(i)|.
  void (*distances)(const double* x, const int64_t* rows, const double* centres, const int64_t* which, int64_t n,
                    int64_t width, double* out);
  // Picks until another point than a leader may be the farthest, all distances are 0, or there are `most`; how many.
  int64_t (*follow)(const Leaders&, int64_t most, int64_t* picks, double* gaps);
};

CP_DECLARE_TABLE(SelectionTable, selection_table)

}  // namespace counterpoise

// Selection: distances of points in double precision, farthest-first picks among a few of them, and what falling costs
// take from gains.
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

// Rows of a tile of costs. With `rounding` >= 0 it holds squares: a cost is the root of what is greater, and 0 for the
// others.
struct CostTile {
  const double* squares;
  int64_t rows, columns;
  double rounding;
};

struct SelectionTable {
  // out_i = |x_rows(i) - centre_which(i)|.
  void (*distances)(const double* x, const int64_t* rows, const double* centres, const int64_t* which, int64_t n,
                    int64_t width, double* out);
  // Picks until another point than a leader may be the farthest, all distances are 0, or there are `most`; how many.
  int64_t (*follow)(const Leaders&, int64_t most, int64_t* picks, double* gaps);
  // out_j += sum_i max(0, before_i - C_ij) - max(0, after_i - C_ij); after_i <= before_i, null = -infinity.
  void (*taken)(const CostTile&, const double* before, const double* after, double* out);
};

CP_DECLARE_TABLE(SelectionTable, selection_table)

}  // namespace counterpoise

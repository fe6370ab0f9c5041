// Selection: distances of points in double precision, farthest-first picks among a few of them, what falling costs
// take from gains, and the least of many costs.
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

// Costs of queries (row-major, of float or double) to keys `start` and on, and a heap of each query's `count` least so
// far, the worst at its top.
struct CostRows {
  const void* costs;
  Type type;
  int64_t columns, start, count;
  bool first;  // nothing is in the heaps yet: the first `count` columns are put there
};

struct SelectionTable {
  // out_i = |x_rows(i) - centre_which(i)|.
  void (*distances)(const double* x, const int64_t* rows, const double* centres, const int64_t* which, int64_t n,
                    int64_t width, double* out);
  // Picks until another point than a leader may be the farthest, all distances are 0, or there are `most`; how many.
  int64_t (*follow)(const Leaders&, int64_t most, int64_t* picks, double* gaps);
  // out_j += sum_i max(0, before_i - C_ij) - max(0, after_i - C_ij); after_i <= before_i, null = -infinity.
  void (*taken)(const CostTile&, const double* before, const double* after, double* out);
  // Takes queries [begin, end) into their heaps: `near` has the costs, `keys` their numbers; ties to the lower number.
  void (*nearest)(const CostRows&, int64_t begin, int64_t end, void* near, int64_t* keys);
};

CP_DECLARE_TABLE(SelectionTable, selection_table)

}  // namespace counterpoise

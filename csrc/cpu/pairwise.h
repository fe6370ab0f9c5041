// Pairwise family: what the loops are given, a tile of products of queries and keys, and what they offer.
#pragma once

#include "capability.h"

namespace counterpoise {

constexpr int64_t pairwise_widest = 4096;  // columns of a tile, at most
constexpr int64_t pairwise_strip = 256;    // columns whose sums are held together where both directions are summed

// Products of the queries [first_row, first_row + rows) and the keys [first_column, ...); float or double throughout.
// A logit is `sharpness` times the product plus the key's log weight. Ids are int32 on the host, int64 on a device.
template <class Id>
struct PairwiseTileOf {
  void* products;  // (rows, columns), contiguous
  bool in_double;
  int64_t rows, columns, first_row, first_column;
  int positive, candidate;                     // math::PairRule
  const Id *query_row, *query_label;           // of all queries; null where no rule asks
  const Id *key_row, *key_label;               // of all keys
  const int64_t* index;                        // (N, positives): positives by index, null = by rule
  const void* probability;                     // (N, positives), null = ones
  int64_t positives;
  const int64_t* itself;                       // (N), the key that is the row and no candidate, null = none
  const void* log_weight;                      // (M), null = zeros
  double sharpness;
};
using PairwiseTile = PairwiseTileOf<int32_t>;

// Sums over the candidates of a row, of exp(logit - top): each (N), null where not wanted.
struct PairwiseSums {
  void *top, *total;
  void* dot;               // of exp(logit - top) times the product
  void *similarity, *mass; // of the positives: sum of products (times probability), and their number (by rule)
  void* mean_key;          // (N, width), is faded as the top rises
  int64_t width;
  bool keep;               // exp(logit - top) replaces the products
};

// Of each row (N): the gradient of a sum over its candidates, share * (slope + bend * (product - middle)), where
// share = exp(logit - log_sum), plus `pull` times what it is a positive of.
struct PairwiseSlopes {
  const void *log_sum, *slope;
  const void *bend, *middle;  // null = none
  int64_t fixed;              // keys before this one have no bend
  const void* pull;           // null = none
  bool mirrored;              // queries are keys, and the gradient of the transposed pair is added
  bool bounded;               // mirrored: all rows share log_sum[0], `slope` makes up for it
};

struct PairwiseTable {
  void (*rows)(const PairwiseTile&, const PairwiseSums&, int64_t begin, int64_t end);
  // Columns [begin, end) of a tile off the diagonal where queries are keys and no logit exceeds the top, which all rows
  // share: sums by row go to by_row (3, rows), those by column to `sums`.
  void (*both)(const PairwiseTile&, const PairwiseSums& sums, int64_t begin, int64_t end, void* by_row);
  void (*slopes)(const PairwiseTile&, const PairwiseSlopes&, int64_t begin, int64_t end);
  // What `pull` adds to pairs by index, of rows that stand in this tile as keys.
  void (*pull_back)(const PairwiseTile&, const PairwiseSlopes&);
  // -log sigmoid of +-(product + bias), + for positives, added to `sums` (N); or in place its slopes times `upstream`,
  // added to `sums` too.
  void (*sigmoid)(const PairwiseTile&, const void* bias, void* sums, int64_t begin, int64_t end);
  void (*sigmoid_slopes)(const PairwiseTile&, const void* bias, const void* upstream, void* sums, int64_t begin,
                         int64_t end);
};

CP_DECLARE_TABLE(PairwiseTable, pairwise_table)

}  // namespace counterpoise

// Element-wise family: what the kernels are given, and how a thread reads its entries.
#pragma once

#include "../cpu/binary.h"
#include "../math/binary.h"
#include "block.cuh"

namespace counterpoise::cuda {

// Entries that a thread takes at a time: 16 bytes of logits, 8 of the half types, whose formulas need registers.
template <class S>
constexpr int binary_width = pack_width<S> < 4 ? pack_width<S> : 4;

template <class S>
struct BinaryInput {
  using T = computed_t<S>;
  const S* logits;
  const void* target;
  Type target_type;
  const uint8_t* mask;  // one byte a row or an entry, null = all count
  bool mask_by_entry;
  const T* entry_weight;  // (row), null = ones
  const T* positive_weight;  // (row), null = ones
  int64_t rows, row;
  bool packs;  // whether every row may be read in packs
  int lanes;   // neighbouring threads that share a row, 0 = flat
  math::BinaryParameters<T> c;
};

// What a thread holds at a time: entries j, j + step, ... of a row that ends at `end`.
template <class S>
struct BinaryEntries {
  using T = computed_t<S>;
  static constexpr int width = binary_width<S>;
  T z[width], t[width];
  bool live[width];
};

template <int N, class T, class S>
CP_DEVICE void load_some(const S* from, int64_t j, int step, int64_t end, bool pack, T (&to)[N]) {
  if (pack) return load_pack(from + j, to);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = j + k * step < end ? static_cast<T>(widen(from[j + k * step])) : T(0);
}

template <int N, class T>
CP_DEVICE void load_labels(const void* from, Type type, int64_t base, int64_t j, int step, int64_t end, bool pack,
                           T (&to)[N]) {
  switch (type) {
    case Type::float64: return load_some(static_cast<const double*>(from) + base, j, step, end, pack, to);
    case Type::bfloat16: return load_some(static_cast<const bfloat16*>(from) + base, j, step, end, pack, to);
    case Type::float16: return load_some(static_cast<const float16*>(from) + base, j, step, end, pack, to);
    case Type::uint8: return load_some(static_cast<const uint8_t*>(from) + base, j, step, end, pack, to);
    case Type::int64: return load_some(static_cast<const int64_t*>(from) + base, j, step, end, pack, to);
    default: return load_some(static_cast<const float*>(from) + base, j, step, end, pack, to);
  }
}

// The row begins at entry `base`. Entries that do not count come out as z = 0, t = 0.
template <bool Check, class S>
CP_DEVICE void read(const BinaryInput<S>& p, int64_t base, int64_t j, int step, int64_t end, bool row_live,
                    BinaryEntries<S>& e) {
  constexpr int width = BinaryEntries<S>::width;
  using T = computed_t<S>;
  const bool pack = p.packs && j + width <= end;
  load_some(p.logits + base, j, step, end, pack, e.z);
  load_labels(p.target, p.target_type, base, j, step, end, pack, e.t);
  float mask[width];
  if (p.mask != nullptr && p.mask_by_entry) load_some(p.mask + base, j, step, end, pack, mask);
  bool bad = false;
#pragma unroll
  for (int k = 0; k < width; ++k) {
    bool live = row_live && j + k * step < end;
    if (p.mask != nullptr && p.mask_by_entry) live = live && mask[k] != 0;
    bad = bad || (live && !(e.t[k] >= 0 && e.t[k] <= 1));
    live = live && !(e.z[k] == -math::infinity<T> && e.t[k] == 0);  // a masked class
    e.live[k] = live;
    e.z[k] = live ? e.z[k] : T(0);
    e.t[k] = live ? e.t[k] : T(0);
  }
  if constexpr (Check) {
    if (bad) stop("target holds a value outside [0, 1]");
  }
}

// A thread's place among those that share rows.
struct Sharing {
  int groups, group, rank, lanes;
  bool by_block;

  explicit CP_DEVICE Sharing(int lanes)
      : groups(blockDim.x / lanes), group(threadIdx.x / lanes), rank(threadIdx.x % lanes), lanes(lanes),
        by_block(lanes > warp_size) {}

  CP_DEVICE Two<double> sum(Two<double> x, Two<double>* scratch) const {
    return by_block ? block_reduce(x, Add(), scratch) : warp_reduce(x, Add(), lanes);
  }
};

// visit(position in the row) for every set of entries of this thread in row r.
template <class S, bool Check, class F>
CP_DEVICE void for_entries(const BinaryInput<S>& p, const Sharing& who, int64_t r, F&& visit) {
  constexpr int width = BinaryEntries<S>::width;
  const bool row_live = p.mask == nullptr || p.mask_by_entry || p.mask[r] != 0;
  const int step = p.packs ? 1 : who.lanes;
  for (int64_t j = p.packs ? who.rank * width : who.rank; j < p.row; j += who.lanes * width) {
    BinaryEntries<S> e;
    read<Check>(p, r * p.row, j, step, p.row, row_live, e);
    visit(e, j, step);
  }
}

}  // namespace counterpoise::cuda

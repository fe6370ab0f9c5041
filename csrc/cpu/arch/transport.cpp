// Transport family: rows of a kernel or a cost are read once, and used for both sides while they are in the cache.
#include "../transport.h"

#include "transport_sides.h"

namespace counterpoise::CP_ARCH {
namespace {

// ---- scalings of a kernel in memory -----------------------------------------------------------------------------

template <class T>
struct Scalings {
  const T *kernel, *f0, *g0;
  int64_t n, k;
  Blocks blocks;
  TransportTeam team;
  T *r, *u, *s, *parts;

  void rows(const T* v) {
    const Tail<T> tail(v, k);
    for_blocks(blocks, team, [&](int64_t, int64_t begin, int64_t end) {
      products(kernel + begin * k, end - begin, k, v, tail, r + begin);
    });
  }

  // With `v` and `side`, u from v first, of a few rows at a time; else u is at hand.
  void columns(const T* v, const Side<T>* side) {
    const int64_t together = near_rows(k);
    const Tail<T> tail(v, side != nullptr ? k : 0);
    for_blocks(blocks, team, [&](int64_t block, int64_t begin, int64_t end) {
      T* part = parts + block * k;
      for (int64_t j = 0; j < k; ++j) part[j] = 0;
      for (int64_t i = begin; i < end; i += together) {
        const int64_t m = least(together, end - i);
        if (side != nullptr) {
          products(kernel + i * k, m, k, v, tail, r + i);
          scaled(*side, i, m, r + i, f0 + i, u + i);
        }
        add_products(kernel + i * k, m, k, u + i, part);
      }
    });
    add_blocks(parts, blocks.count, k, s);
  }
};

template <class T>
void scale_of(const TransportScalings& p, TransportTeam team) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  const auto out = [](void* x) { return static_cast<T*>(x); };
  const int64_t n = p.rows.size, k = p.columns.size;
  const Blocks blocks = blocks_of(n, k);
  const bool shift = p.rows.log_exact != nullptr;
  Buffer<T> parts(blocks.count * k), scratch(shift ? most(n, k) : 0);
  Scalings<T> on{at(p.kernel), at(p.f0), at(p.g0), n, k, blocks, team, out(p.r), out(p.u), out(p.s), parts.get()};
  Side<T> rows = side_of<T>(p.rows, p.epsilon), columns = side_of<T>(p.columns, p.epsilon);
  T *v = out(p.v), *f = out(p.f), *g = out(p.g);
  for (int64_t turn = 0; turn < p.count; ++turn) {
    if (p.rows.ceiling != nullptr) {
      on.rows(v);
      rows.ceiling = level(rows, n, on.r, on.f0, static_cast<double>(*at(p.rows.amount)));
      scaled(rows, 0, n, on.r, on.f0, on.u);
      on.columns(nullptr, nullptr);
    } else {
      on.columns(v, &rows);
    }
    if (p.columns.ceiling != nullptr)
      columns.ceiling = level(columns, k, on.s, on.g0, static_cast<double>(*at(p.columns.amount)));
    scaled(columns, 0, k, on.s, on.g0, v);
    if (!shift && turn + 1 < p.count) continue;
    potentials(rows, n, on.r, on.f0, f);
    potentials(columns, k, on.s, on.g0, g);
    if (!shift) continue;
    const double of_rows = log_mass_of(rows, n, f, *at(p.rows.log_exact), scratch.get());
    const double of_columns = log_mass_of(columns, k, g, *at(p.columns.log_exact), scratch.get());
    const T c = math::common_shift<T>(p.shift_length, of_rows, of_columns);
    const T up = static_cast<T>(math::exp(static_cast<double>(c) / p.epsilon));
    for (int64_t i = 0; i < n; ++i) f[i] += c;
    for (int64_t i = 0; i < n; ++i) on.u[i] *= up;
    for (int64_t j = 0; j < k; ++j) g[j] -= c;
    for (int64_t j = 0; j < k; ++j) v[j] /= up;
    for (int64_t j = 0; j < k; ++j) on.s[j] *= up;
  }
  if (p.rows.ceiling != nullptr) *out(p.rows.ceiling) = rows.ceiling;
  if (p.columns.ceiling != nullptr) *out(p.columns.ceiling) = columns.ceiling;
}

// ---- a cost whose kernel exists in rows only --------------------------------------------------------------------

template <class T>
struct Tile {
  const T *cost, *of_row, *of_column, *g;
  int64_t rows, columns;
  T epsilon, by;
};

template <class T>
Tile<T> tile_of(const TransportTile& p) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  const T epsilon = static_cast<T>(p.epsilon);
  return {at(p.cost), at(p.of_row), at(p.of_column), at(p.g), p.rows, p.columns, epsilon, static_cast<T>(1 / p.epsilon)};
}

// Rows are kept as whole vectors: behind their columns stand exponents of minus infinity, and numbers of zero.
template <class T>
int64_t whole(int64_t columns) {
  constexpr int64_t w = Vector<T>::width;
  return (columns + w - 1) / w * w;
}

// x_j = g_j - C_ij of a row; the largest, NaN where there is one.
template <class T>
T above_cost(const Tile<T>& p, int64_t i, T* __restrict x) {
  const T* cost = p.cost + i * p.columns;
  const int64_t k = p.columns, n = whole<T>(k);
  if (p.of_row == nullptr) {
    for (int64_t j = 0; j < k; ++j) x[j] = p.g[j] - cost[j];
  } else {
    const T of_row = p.of_row[i];
    for (int64_t j = 0; j < k; ++j) x[j] = p.g[j] - math::transport_cost<true>(cost[j], of_row, p.of_column[j]);
  }
  for (int64_t j = k; j < n; ++j) x[j] = -infinity<T>;
  return largest_or_nan(x, n);
}

// Sums over rows of exponentials, each column relative to its largest exponent so far.
template <class T>
struct ColumnLogs {
  T *top, *total;  // (columns)
  int64_t columns;

  void clear() {
    for (int64_t j = 0; j < columns; ++j) top[j] = lowest<T>;
    for (int64_t j = 0; j < columns; ++j) total[j] = 0;
  }

  // Rows of exponents x_ij + log_u_i.
  void add(const T* x, int64_t rows, const T* log_u) {
    constexpr int64_t strip = 256;
    for (int64_t begin = 0; begin < columns; begin += strip) {
      const int64_t n = least(strip, columns - begin);
      T high[strip];
      T *t = top + begin, *sum = total + begin;
      for (int64_t j = 0; j < n; ++j) high[j] = t[j];
      for (int64_t i = 0; i < rows; ++i) {
        const T *row = x + i * columns + begin, up = log_u[i];
        for (int64_t j = 0; j < n; ++j) high[j] = math::at_least(high[j], row[j] + up);
      }
      for (int64_t j = 0; j < n; ++j) sum[j] *= math::exp_in_loop(t[j] - high[j]);
      for (int64_t j = 0; j < n; ++j) t[j] = high[j];
      for (int64_t i = 0; i < rows; ++i) {
        const T *row = x + i * columns + begin, up = log_u[i];
        for (int64_t j = 0; j < n; ++j) sum[j] += math::exp_in_loop(row[j] + up - high[j]);
      }
    }
  }
};

// log s of the blocks' parts, in their order.
template <class T>
void merge_blocks(const T* tops, const T* totals, int64_t blocks, int64_t n, T* __restrict s) {
  Buffer<T> buffer(2 * n);
  T *__restrict top = buffer.get(), *__restrict total = top + n;
  for (int64_t j = 0; j < n; ++j) top[j] = lowest<T>;
  for (int64_t j = 0; j < n; ++j) total[j] = 0;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t j = 0; j < n; ++j) top[j] = math::at_least(top[j], tops[b * n + j]);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t j = 0; j < n; ++j) total[j] += totals[b * n + j] * math::exp_in_loop(tops[b * n + j] - top[j]);
  for (int64_t j = 0; j < n; ++j) s[j] = math::log(total[j]) + top[j];
}

template <class T>
void sweep_of(const TransportTile& tile, const TransportSweep& sweep, TransportTeam team) {
  const Tile<T> p = tile_of<T>(tile);
  const int64_t k = p.columns, n = whole<T>(k);
  T *f = static_cast<T*>(sweep.f), *r = static_cast<T*>(sweep.r), *u = static_cast<T*>(sweep.u);
  const bool rows = sweep.v != nullptr, columns = sweep.s != nullptr, logs = columns && sweep.logs;
  const Side<T> side = sweep.side != nullptr ? side_of<T>(*sweep.side, tile.epsilon) : Side<T>{};
  const Blocks blocks = blocks_of(p.rows, k);
  const int64_t together = least(16, near_rows(n));
  Buffer<T> parts(columns ? blocks.count * n : 0), tops(logs ? blocks.count * n : 0), v(n), s(n);
  for (int64_t j = 0; j < n; ++j) v[j] = rows && j < k ? static_cast<const T*>(sweep.v)[j] : T(0);
  const Tail<T> tail(v.get(), n);
  for_blocks(blocks, team, [&](int64_t block, int64_t begin, int64_t end) {
    ColumnLogs<T> sums{tops.get() + block * n, parts.get() + block * n, n};
    if (logs) sums.clear();
    if (columns && !logs)
      for (int64_t j = 0; j < n; ++j) sums.total[j] = 0;
    Buffer<T> exponents(together * n), kernel(together * n);
    for (int64_t i = begin; i < end; i += together) {
      const int64_t m = least(together, end - i);
      for (int64_t row = 0; row < m; ++row) {
        T *__restrict x = exponents.get() + row * n, *__restrict e = kernel.get() + row * n;
        const T top = above_cost(p, i + row, x);
        if (rows) f[i + row] = -math::at_least(lowest<T>, top);
        const T offset = f[i + row];
        if (logs)
          for (int64_t j = 0; j < n; ++j) x[j] = (x[j] + offset) * p.by;
        if (logs && rows)
          for (int64_t j = 0; j < n; ++j) e[j] = math::exp_in_loop(x[j]);
        if (!logs)
          for (int64_t j = 0; j < n; ++j) e[j] = math::exp_in_loop((x[j] + offset) * p.by);
      }
      if (rows) products(kernel.get(), m, n, v.get(), tail, r + i);
      if (sweep.side != nullptr && logs) {
        log_scale(side, i, m, r + i, f + i, u + i);
        for (int64_t row = i; row < i + m; ++row) u[row] += math::log(side.reference[row]);
      } else if (sweep.side != nullptr) {
        scaled(side, i, m, r + i, f + i, u + i);
      }
      if (logs) sums.add(exponents.get(), m, u + i);
      if (columns && !logs) add_products(kernel.get(), m, n, u + i, sums.total);
    }
  });
  if (!columns) return;
  if (logs) {
    merge_blocks(tops.get(), parts.get(), blocks.count, n, s.get());
  } else {
    add_blocks(parts.get(), blocks.count, n, s.get());
  }
  for (int64_t j = 0; j < k; ++j) static_cast<T*>(sweep.s)[j] = s[j];
}

// ---- before and behind the iterations ---------------------------------------------------------------------------

template <class T>
void kernel_of(const TransportTile& tile, const void* offsets, void* out, TransportTeam team) {
  const Tile<T> p = tile_of<T>(tile);
  const T* f = static_cast<const T*>(offsets);
  for_blocks(blocks_of(p.rows, p.columns), team, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* __restrict cost = p.cost + i * p.columns;
      T* __restrict row = static_cast<T*>(out) + i * p.columns;
      const T offset = f[i];
      for (int64_t j = 0; j < p.columns; ++j) row[j] = math::exp_in_loop((p.g[j] - cost[j] + offset) * p.by);
    }
  });
}

template <class T>
void plan_of(void* kernel, const void* row_scalings, const void* column_scalings, int64_t rows, int64_t columns,
             TransportTeam team) {
  const T *u = static_cast<const T*>(row_scalings), *__restrict v = static_cast<const T*>(column_scalings);
  for_blocks(blocks_of(rows, columns), team, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* __restrict row = static_cast<T*>(kernel) + i * columns;
      const T by = u[i];
      for (int64_t j = 0; j < columns; ++j) row[j] = row[j] * by * v[j];
    }
  });
}

template <class T>
double start_of(const TransportTile& tile, const void* row_mass, const void* column_mass, void* f, void* g,
                TransportTeam team) {
  const Tile<T> p = tile_of<T>(tile);
  const T *a = static_cast<const T*>(row_mass), *b = static_cast<const T*>(column_mass);
  const Blocks blocks = blocks_of(p.rows, p.columns);
  Buffer<T> least_above(blocks.count * p.columns), spreads(blocks.count), nowhere(p.columns);
  for (int64_t j = 0; j < p.columns; ++j) nowhere[j] = b[j] == 0 ? infinity<T> : T(0);
  for_blocks(blocks, team, [&](int64_t block, int64_t begin, int64_t end) {
    T* __restrict low = least_above.get() + block * p.columns;
    for (int64_t j = 0; j < p.columns; ++j) low[j] = infinity<T>;
    Buffer<T> buffer(2 * p.columns);
    T *__restrict x = buffer.get(), *__restrict finite = x + p.columns;
    T spread = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T* cost = p.cost + i * p.columns;
      for (int64_t j = 0; j < p.columns; ++j) x[j] = -(cost[j] + nowhere[j]);
      const T offset = -largest_or_nan(x, p.columns);
      static_cast<T*>(f)[i] = offset;
      for (int64_t j = 0; j < p.columns; ++j) x[j] = cost[j] - offset;
      for (int64_t j = 0; j < p.columns; ++j) finite[j] = x[j] < infinity<T> ? x[j] : T(0);
      spread = math::at_least(spread, largest_or_nan(finite, p.columns));
      if (a[i] == 0) continue;
      for (int64_t j = 0; j < p.columns; ++j) low[j] = x[j] < low[j] ? x[j] : low[j];
    }
    spreads[block] = spread;
  });
  T spread = 0, *to = static_cast<T*>(g);
  for (int64_t j = 0; j < p.columns; ++j) to[j] = infinity<T>;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const T* low = least_above.get() + block * p.columns;
    for (int64_t j = 0; j < p.columns; ++j) to[j] = math::at_most(to[j], low[j]);
    spread = math::at_least(spread, spreads[block]);
  }
  return static_cast<double>(spread);
}

#define CP_BY_TYPE(type, call, ...) \
  return (type) == Type::float64 ? call<double>(__VA_ARGS__) : call<float>(__VA_ARGS__)

void scale(const TransportScalings& p, TransportTeam team) { CP_BY_TYPE(p.type, scale_of, p, team); }
void sweep(const TransportTile& p, const TransportSweep& s, TransportTeam team) {
  CP_BY_TYPE(p.type, sweep_of, p, s, team);
}
void kernel(const TransportTile& p, const void* f, void* out, TransportTeam team) {
  CP_BY_TYPE(p.type, kernel_of, p, f, out, team);
}
void plan(void* kernel, const void* u, const void* v, int64_t rows, int64_t columns, Type type, TransportTeam team) {
  CP_BY_TYPE(type, plan_of, kernel, u, v, rows, columns, team);
}
double start(const TransportTile& p, const void* a, const void* b, void* f, void* g, TransportTeam team) {
  CP_BY_TYPE(p.type, start_of, p, a, b, f, g, team);
}

}  // namespace

const TransportTable transport_table = {scale, sweep, kernel, plan, start};

}  // namespace counterpoise::CP_ARCH

// Transport family: rows of a kernel or a cost are read once, and used for both sides while they are in the cache.
#include "../transport.h"

#include <stdlib.h>

#include "../../math/transport.h"
#include "types.h"

namespace counterpoise::CP_ARCH {
namespace {

using math::infinity;

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Compilers do not reorder a sum; these say which parts of it are independent.
template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T anywhere __attribute__((vector_size(vector_bytes), aligned(sizeof(T)), may_alias));
  static constexpr int width = vector_bytes / sizeof(T);
};

template <class T>
constexpr T lowest = std::numeric_limits<T>::lowest();

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// Memory for the loops of one call; none of C++'s containers, whose code other instruction sets might run.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : at_(static_cast<T*>(aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64))) {
    if (at_ == nullptr) abort();
  }
  ~Buffer() { free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return at_; }
  T& operator[](int64_t i) { return at_[i]; }

 private:
  T* at_;
};

// ---- blocks of rows ---------------------------------------------------------------------------------------------

constexpr int64_t block_entries = 1 << 15;  // at least, of a block that another thread may take
constexpr int64_t near_entries = 1 << 15;   // of rows that stay in the cache between two uses

struct Blocks {
  int64_t rows, step, count;
};

Blocks blocks_of(int64_t rows, int64_t columns) {
  const int64_t limit = least(64, most(8, (int64_t(1) << 20) / most(1, columns)));
  const int64_t by_size = (block_entries + columns - 1) / most(1, columns), by_count = (rows + limit - 1) / limit;
  const int64_t step = (most(most(by_size, by_count), 1) + 3) / 4 * 4;
  return {rows, step, (rows + step - 1) / step};
}

template <class F>
struct Job {
  const Blocks* blocks;
  F* f;
  static void run(void* argument, int64_t block) {
    const Job& job = *static_cast<Job*>(argument);
    const int64_t begin = block * job.blocks->step;
    (*job.f)(block, begin, least(begin + job.blocks->step, job.blocks->rows));
  }
};

// f(block, first row, behind the last row).
template <class F>
void for_blocks(const Blocks& blocks, TransportTeam team, F&& f) {
  Job<F> job{&blocks, &f};
  if (blocks.count == 1) return Job<F>::run(&job, 0);
  if (blocks.count > 1) team(blocks.count, Job<F>::run, &job);
}

// Rows that are taken together: a multiple of four, unless they are long.
int64_t near_rows(int64_t columns) { return least(64, most(4, near_entries / most(1, columns) / 4 * 4)); }

// ---- products with a vector -------------------------------------------------------------------------------------

// A vector with zeros in front, so that the last entries of a row make a full vector with some that have been seen.
template <class T>
struct Tail {
  static constexpr int w = Vector<T>::width;
  T x[w];
  Tail(const T* v, int64_t n) {
    const int64_t left = n % w;
    for (int64_t i = 0; i < w; ++i) x[i] = n >= w && i >= w - left ? v[n - w + i] : T(0);
  }
};

template <class T>
CP_INLINE typename Vector<T>::type load_vector(const T* x) {
  return *reinterpret_cast<const typename Vector<T>::anywhere*>(x);
}

// out_r = sum_j a_rj v_j of R rows.
template <int R, class T>
CP_INLINE void dot(const T* a, int64_t stride, const T* v, const Tail<T>& tail, int64_t n, T* out) {
  using V = typename Vector<T>::type;
  constexpr int w = Vector<T>::width;
  if (n < w) {
    for (int r = 0; r < R; ++r) {
      T total = 0;
      for (int64_t j = 0; j < n; ++j) total += a[r * stride + j] * v[j];
      out[r] = total;
    }
    return;
  }
  V part[R] = {}, other[R] = {};
  int64_t j = 0;
  for (; j + 2 * w <= n; j += 2 * w) {
    const V x = load_vector(v + j), y = load_vector(v + j + w);
    for (int r = 0; r < R; ++r) {
      part[r] += load_vector(a + r * stride + j) * x;
      other[r] += load_vector(a + r * stride + j + w) * y;
    }
  }
  if (j + w <= n) {
    const V x = load_vector(v + j);
    for (int r = 0; r < R; ++r) part[r] += load_vector(a + r * stride + j) * x;
    j += w;
  }
  if (j < n) {
    const V x = load_vector(tail.x);
    for (int r = 0; r < R; ++r) other[r] += load_vector(a + r * stride + n - w) * x;
  }
  alignas(64) T lanes[R][w];
  for (int r = 0; r < R; ++r) *reinterpret_cast<typename Vector<T>::anywhere*>(lanes[r]) = part[r] + other[r];
  for (int k = w / 2; k > 0; k /= 2)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < k; ++i) lanes[r][i] += lanes[r][i + k];
  for (int r = 0; r < R; ++r) out[r] = lanes[r][0];
}

template <class T>
void products(const T* a, int64_t rows, int64_t columns, const T* v, const Tail<T>& tail, T* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) dot<4>(a + i * columns, columns, v, tail, columns, out + i);
  for (; i < rows; ++i) dot<1>(a + i * columns, columns, v, tail, columns, out + i);
}

// s_j += sum_i u_i a_ij; meanwhile what lies as many rows ahead is fetched.
template <class T>
void add_products(const T* __restrict a, int64_t rows, int64_t columns, const T* u, T* __restrict s) {
  constexpr int w = Vector<T>::width;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const T *a0 = a + i * columns, *a1 = a0 + columns, *a2 = a1 + columns, *a3 = a2 + columns;
    const T u0 = u[i], u1 = u[i + 1], u2 = u[i + 2], u3 = u[i + 3];
    const int64_t ahead = rows * columns;
    int64_t j = 0;
    for (; j + w <= columns; j += w) {
      *reinterpret_cast<typename Vector<T>::anywhere*>(s + j) +=
          (u0 * load_vector(a0 + j) + u1 * load_vector(a1 + j)) + (u2 * load_vector(a2 + j) + u3 * load_vector(a3 + j));
      __builtin_prefetch(a0 + ahead + j);
      __builtin_prefetch(a1 + ahead + j);
      __builtin_prefetch(a2 + ahead + j);
      __builtin_prefetch(a3 + ahead + j);
    }
    for (; j < columns; ++j) s[j] += (u0 * a0[j] + u1 * a1[j]) + (u2 * a2[j] + u3 * a3[j]);
  }
  for (; i < rows; ++i) {
    const T *row = a + i * columns, by = u[i];
    for (int64_t j = 0; j < columns; ++j) s[j] += by * row[j];
  }
}

// s = the blocks' parts in their order.
template <class T>
void add_blocks(const T* parts, int64_t blocks, int64_t n, T* __restrict s) {
  for (int64_t j = 0; j < n; ++j) s[j] = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const T* part = parts + b * n;
    for (int64_t j = 0; j < n; ++j) s[j] += part[j];
  }
}

// ---- logarithms of sums -----------------------------------------------------------------------------------------

// NaN wherever there is one.
template <class T>
T largest(const T* x, int64_t n) {
  using V = Vector<T>;
  constexpr int w = V::width;
  T top = -infinity<T>, bad = 0;
  int64_t j = 0;
  if (n >= w) {
    typename V::type high = *reinterpret_cast<const typename V::anywhere*>(x), nan = high;
    for (; j + w <= n; j += w) {
      const typename V::type y = *reinterpret_cast<const typename V::anywhere*>(x + j);
      nan = y == y ? nan : y;
      high = y > high ? y : high;
    }
    for (int k = 0; k < w; ++k) {
      top = high[k] > top ? high[k] : top;
      bad = nan[k] == nan[k] ? bad : nan[k];
    }
  }
  for (; j < n; ++j) {
    top = x[j] > top ? x[j] : top;
    bad = x[j] == x[j] ? bad : x[j];
  }
  return bad == bad ? top : bad;
}

template <class T>
double log_sum_exp(const T* x, int64_t n) {
  const T top = largest(x, n);
  if (!(top > -infinity<T> && top < infinity<T>)) return static_cast<double>(top);
  constexpr int64_t piece = 256;
  T e[piece];
  double total = 0;
  for (int64_t j = 0; j < n; j += piece) {
    const int64_t m = least(piece, n - j);
    for (int64_t i = 0; i < m; ++i) e[i] = math::exp_in_loop(x[j + i] - top);
    total += static_cast<double>(sum(e, m));
  }
  return static_cast<double>(top) + math::log(total);
}

double log_add_exp(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  if (a != a || b != b) return a + b;
  return high == -infinity<double> || high == low ? high + (high == low ? math::log(2.0) : 0.0)
                                                  : high + math::log1p_unit(math::exp(low - high)).log;
}

// ---- sides ------------------------------------------------------------------------------------------------------

template <class T>
struct Side {
  const T *mass, *reference, *log_ratio, *penalty, *pull;
  T ceiling, epsilon;
  bool exact;  // u is the mass over the sum
};

template <class T>
Side<T> side_of(const TransportSide& s, double epsilon) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  const T ceiling = s.ceiling == nullptr ? infinity<T> : *static_cast<const T*>(s.ceiling);
  return {at(s.mass), at(s.reference), at(s.log_ratio), at(s.penalty), at(s.pull), ceiling, static_cast<T>(epsilon),
          s.pull == nullptr && s.ceiling == nullptr};
}

// (potential - offset) / epsilon of entries [i, i + n), from their sums.
template <class T>
void log_scale(const Side<T>& s, int64_t i, int64_t n, const T* sums, const T* offset, T* out) {
  const T *mass = s.mass + i, *ratio = s.log_ratio + i, *pull = s.pull == nullptr ? nullptr : s.pull + i;
  for (int64_t k = 0; k < n; ++k) out[k] = math::log(math::divisor(sums[k], mass[k]));
  if (pull == nullptr) {
    for (int64_t k = 0; k < n; ++k)
      out[k] = math::log_scaling(ratio[k], out[k], T(0), s.epsilon, offset[k], s.ceiling);
  } else {
    for (int64_t k = 0; k < n; ++k)
      out[k] = math::log_scaling(ratio[k], out[k], pull[k], s.epsilon, offset[k], s.ceiling);
  }
}

// U of entries [i, i + n).
template <class T>
void scaled(const Side<T>& s, int64_t i, int64_t n, const T* sums, const T* offset, T* out) {
  if (s.exact) {
    for (int64_t k = 0; k < n; ++k) out[k] = s.mass[i + k] / math::divisor(sums[k], s.mass[i + k]);
    return;
  }
  log_scale(s, i, n, sums, offset, out);
  for (int64_t k = 0; k < n; ++k) out[k] = s.reference[i + k] * math::exp_in_loop(out[k]);
}

template <class T>
void potentials(const Side<T>& s, int64_t n, const T* sums, const T* offset, T* out) {
  log_scale(s, 0, n, sums, offset, out);
  for (int64_t k = 0; k < n; ++k) out[k] = offset[k] + s.epsilon * out[k];
}

constexpr int newton_steps = 3;

// The ceiling at which the plan has its mass; from the last one, by a few Newton steps.
template <class T>
T level(const Side<T>& s, int64_t n, const T* sums, const T* offset, double amount) {
  Buffer<T> logs(n), parts(n), log_mass(n);
  for (int64_t k = 0; k < n; ++k) {
    const T log_sum = math::log(math::divisor(sums[k], s.mass[k])) - offset[k] / s.epsilon;
    logs[k] = s.mass[k] == 0 ? -infinity<T> : log_sum;
    log_mass[k] = math::log(s.mass[k]);
  }
  const double floor = math::log(amount) - log_sum_exp(logs.get(), n);  // where no mass binds
  double now = static_cast<double>(s.ceiling) / s.epsilon;
  now = now > floor ? now : floor;
  const double eps = std::numeric_limits<T>::epsilon(), tiny = std::numeric_limits<T>::min();
  for (int step = 0; step < newton_steps; ++step) {
    const T at = static_cast<T>(now);
    for (int64_t k = 0; k < n; ++k) parts[k] = math::exp_in_loop(math::at_most(log_mass[k], logs[k] + at));
    double held = 0, slope = 0;
    constexpr int64_t piece = 1024;
    for (int64_t j = 0; j < n; j += piece) {
      const int64_t m = least(piece, n - j);
      held += static_cast<double>(sum(parts.get() + j, m));
      for (int64_t k = j; k < j + m; ++k) parts[k] = logs[k] + at < log_mass[k] ? parts[k] : T(0);
      slope += static_cast<double>(sum(parts.get() + j, m));
    }
    const double missing = amount - held, rounding = 4 * eps * amount;
    const double rest = missing <= rounding && missing >= -rounding ? 0.0 : missing;
    const double growth = 1 + rest / (slope > tiny ? slope : tiny);
    const double next = growth > 0 ? now + math::log(growth) : floor;
    now = next > floor ? next : floor;
  }
  return s.epsilon * static_cast<T>(now);
}

// log of the mass that a side with this potential has: of its exact entries, and of the others.
template <class T>
double log_mass_of(const Side<T>& s, int64_t n, const T* potential, T log_exact, T* scratch) {
  if (s.penalty == nullptr) return static_cast<double>(log_exact);
  for (int64_t k = 0; k < n; ++k) {
    const T x = math::log(s.mass[k]) - potential[k] / s.penalty[k];
    scratch[k] = s.penalty[k] == infinity<T> ? -infinity<T> : x;
  }
  return log_add_exp(log_sum_exp(scratch, n), static_cast<double>(log_exact));
}

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
    const double found = p.shift_length * (of_rows - of_columns);
    const T c = found - found == 0 ? static_cast<T>(found) : T(0);
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
  return largest(x, n);
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
      const T offset = -largest(x, p.columns);
      static_cast<T*>(f)[i] = offset;
      for (int64_t j = 0; j < p.columns; ++j) x[j] = cost[j] - offset;
      for (int64_t j = 0; j < p.columns; ++j) finite[j] = x[j] < infinity<T> ? x[j] : T(0);
      spread = math::at_least(spread, largest(finite, p.columns));
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

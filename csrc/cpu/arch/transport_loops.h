// Transport family: what its loops are made of. Blocks of rows, products with a vector, logarithms of sums.
#pragma once

#include "../transport.h"

#include <stdlib.h>

#include "../../math/transport.h"
#include "types.h"

namespace counterpoise::CP_ARCH {

using math::infinity;

// Compilers do not reorder a sum; these say which parts of it are independent.
template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T anywhere __attribute__((vector_size(vector_bytes), aligned(sizeof(T)), may_alias));
  static constexpr int width = vector_bytes / sizeof(T);
};

template <class T>
constexpr T lowest = std::numeric_limits<T>::lowest();

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

inline Blocks blocks_of(int64_t rows, int64_t columns) {
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
inline int64_t near_rows(int64_t columns) { return least(64, most(4, near_entries / most(1, columns) / 4 * 4)); }

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
T largest_or_nan(const T* x, int64_t n) {
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
  const T top = largest_or_nan(x, n);
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

}  // namespace counterpoise::CP_ARCH

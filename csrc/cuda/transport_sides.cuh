// Transport family: the two sides of a problem on a GPU. What a potential or scaling becomes, given the sums on its
// side; the plain form is counterpoise/ot/_sides.py, and csrc/math/transport.h has the formulas.
//
// In come sums of a kernel and the offsets in it, out go scalings, potentials and ceilings. What all entries of a side
// decide together (a ceiling, the common shift) one block finds for a problem, so that nothing waits for the host.
#pragma once

#include "../cpu/transport.h"
#include "../math/transport.h"
#include "block.cuh"

namespace counterpoise::cuda {

// One side of all problems of a batch, one problem behind the other.
template <class T>
struct Side {
  const T *mass, *reference, *log_ratio;  // (problems, size)
  const T *penalty, *pull;                // (size), null = exact
  const T *amount, *log_exact;            // (problems), null = no ceiling, no shift
  T* ceiling;                             // (problems), is moved; null = none
  int64_t size;
  T epsilon;
};

template <class T>
Side<T> side_of(const TransportSide& s, double epsilon) {
  const auto at = [](const void* x) { return static_cast<const T*>(x); };
  return {at(s.mass),   at(s.reference), at(s.log_ratio),           at(s.penalty), at(s.pull),
          at(s.amount), at(s.log_exact), static_cast<T*>(s.ceiling), s.size,        static_cast<T>(epsilon)};
}

// ---- an entry ---------------------------------------------------------------------------------------------------

// (potential - offset) / epsilon of entry i of a problem, from its sum.
template <class T>
CP_DEVICE T log_scale(const Side<T>& s, int64_t problem, int64_t i, T sum, T offset, T ceiling) {
  const int64_t at = problem * s.size + i;
  const T log_sum = math::log(math::divisor(sum, s.mass[at])), pull = s.pull == nullptr ? T(0) : s.pull[i];
  return math::log_scaling(s.log_ratio[at], log_sum, pull, s.epsilon, offset, ceiling);
}

// U of the entry.
template <class T>
CP_DEVICE T scaled(const Side<T>& s, int64_t problem, int64_t i, T sum, T offset, T ceiling) {
  const int64_t at = problem * s.size + i;
  if (s.pull == nullptr && s.ceiling == nullptr) return s.mass[at] / math::divisor(sum, s.mass[at]);
  return s.reference[at] * math::exp(log_scale(s, problem, i, sum, offset, ceiling));
}

// Scaling and potential of the entry into arrays (problems, size); `potential` null = not wanted.
template <class T>
CP_DEVICE void settle(const Side<T>& s, int64_t problem, int64_t i, T sum, const T* offset, T ceiling, T* scaling,
                      T* potential) {
  const int64_t at = problem * s.size + i;
  scaling[at] = scaled(s, problem, i, sum, offset[at], ceiling);
  if (potential != nullptr)
    potential[at] = offset[at] + s.epsilon * log_scale(s, problem, i, sum, offset[at], ceiling);
}

// ---- a side, by all threads of a block --------------------------------------------------------------------------

template <class T>
struct SideScratch {
  T tops[warp_size];
  double sums[warp_size];
  Two<double> pairs[warp_size];
};

// log of the sum of e^exponent(i) over [0, n); NaN where there is one.
template <class T, class X>
CP_DEVICE double block_log_sum_exp(int64_t n, const X& exponent, SideScratch<T>& scratch) {
  T top = Larger::none<T>();
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) top = Larger()(top, exponent(i));
  top = block_reduce(top, Larger(), scratch.tops);
  if (!(top > -math::infinity<T> && top < math::infinity<T>)) return static_cast<double>(top);
  double total = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) total += static_cast<double>(math::exp(exponent(i) - top));
  return static_cast<double>(top) + math::log(block_reduce(total, Add(), scratch.sums));
}

// The ceiling at which a problem's plan has its mass; from the last one, by a few Newton steps. `logs` (problems, size)
// is written over. Each thread reads of it only what it wrote.
template <class T>
CP_DEVICE T block_level(const Side<T>& s, int64_t problem, const T* sums, const T* offset, T* logs,
                        SideScratch<T>& scratch) {
  const int64_t first = problem * s.size;
  const T* mass = s.mass + first;
  T* log_sums = logs + first;
  for (int64_t i = threadIdx.x; i < s.size; i += blockDim.x) {
    const T log_sum = math::log(math::divisor(sums[first + i], mass[i])) - offset[first + i] / s.epsilon;
    log_sums[i] = mass[i] == 0 ? -math::infinity<T> : log_sum;
  }
  const double amount = static_cast<double>(s.amount[problem]);
  const double of_all = block_log_sum_exp(s.size, [&](int64_t i) { return log_sums[i]; }, scratch);
  const double floor = math::log(amount) - of_all;  // where no mass binds
  double now = static_cast<double>(s.ceiling[problem]) / static_cast<double>(s.epsilon);
  now = now > floor ? now : floor;
#pragma unroll 1
  for (int step = 0; step < math::newton_steps; ++step) {
    const T at = static_cast<T>(now);
    Two<double> held{0, 0};  // all of it, and what grows with the ceiling
    for (int64_t i = threadIdx.x; i < s.size; i += blockDim.x) {
      const T log_mass = math::log(mass[i]), grown = log_sums[i] + at;
      const auto part = static_cast<double>(math::exp(math::at_most(log_mass, grown)));
      held.first += part;
      held.second += grown < log_mass ? part : 0.0;
    }
    held = block_reduce(held, Add(), scratch.pairs);
    now = math::next_level<T>(now, floor, amount, held.first, held.second);
  }
  return s.epsilon * static_cast<T>(now);
}

// The ceiling of a problem, and the scalings and potentials below it; `potential` null = not wanted.
template <class T>
CP_DEVICE void block_settle(const Side<T>& s, int64_t problem, const T* sums, const T* offset, T* scaling, T* potential,
                            SideScratch<T>& scratch) {
  const T ceiling = block_level(s, problem, sums, offset, scaling, scratch);
  for (int64_t i = threadIdx.x; i < s.size; i += blockDim.x)
    settle(s, problem, i, sums[problem * s.size + i], offset, ceiling, scaling, potential);
  if (threadIdx.x == 0) s.ceiling[problem] = ceiling;  // which all have read: they met in the reductions
}

// log of the mass that a side with this potential (problems, size) has: of its exact entries, and of the others.
template <class T>
CP_DEVICE double block_log_mass(const Side<T>& s, int64_t problem, const T* potential, SideScratch<T>& scratch) {
  const auto exact = static_cast<double>(s.log_exact[problem]);
  if (s.penalty == nullptr) return exact;
  const int64_t first = problem * s.size;
  const auto log_mass = [&](int64_t i) {
    return math::free_log_mass(s.mass[first + i], potential[first + i], s.penalty[i]);
  };
  return math::log_add_exp(block_log_sum_exp(s.size, log_mass, scratch), exact);
}

// ---- a side from sums that are at hand --------------------------------------------------------------------------

// u, or (Logs) its logarithm, of a side without a ceiling.
template <class T, bool Logs>
__global__ void __launch_bounds__(256)
    transport_side_kernel(Side<T> side, int64_t problems, const T* offset, const T* sums, T* u) {
  for (int64_t at = grid_first(); at < problems * side.size; at += grid_stride()) {
    const int64_t problem = at / side.size, i = at % side.size;
    if constexpr (Logs) {
      const T moved = log_scale(side, problem, i, sums[at], offset[at], math::infinity<T>);
      u[at] = moved + math::log(side.reference[at]);
    } else {
      u[at] = scaled(side, problem, i, sums[at], offset[at], math::infinity<T>);
    }
  }
}

// u (problems, rows) from f and r of the rows.
template <class T>
void transport_side_on(const TransportSide& given, int64_t problems, double epsilon, bool logs, const void* f,
                       const void* r, void* u, void* stream) {
  constexpr int threads = 256;
  constexpr int64_t most_blocks = 1 << 16;
  const int64_t blocks = (problems * given.size + threads - 1) / threads;
  if (blocks == 0) return;
  launch(logs ? transport_side_kernel<T, true> : transport_side_kernel<T, false>,
         {blocks < most_blocks ? blocks : most_blocks, threads, stream}, side_of<T>(given, epsilon), problems,
         static_cast<const T*>(f), static_cast<const T*>(r), static_cast<T*>(u));
}

}  // namespace counterpoise::cuda

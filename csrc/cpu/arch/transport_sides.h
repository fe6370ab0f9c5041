// Transport family: the two sides of a problem. What a potential or scaling becomes, given the sums on its side; the plain
// form is counterpoise/ot/_sides.py.
#pragma once

#include "transport_loops.h"

namespace counterpoise::CP_ARCH {

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
  for (int step = 0; step < math::newton_steps; ++step) {
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
    now = math::next_level<T>(now, floor, amount, held, slope);
  }
  return s.epsilon * static_cast<T>(now);
}

// log of the mass that a side with this potential has: of its exact entries, and of the others.
template <class T>
double log_mass_of(const Side<T>& s, int64_t n, const T* potential, T log_exact, T* scratch) {
  if (s.penalty == nullptr) return static_cast<double>(log_exact);
  for (int64_t k = 0; k < n; ++k) scratch[k] = math::free_log_mass(s.mass[k], potential[k], s.penalty[k]);
  return math::log_add_exp(log_sum_exp(scratch, n), static_cast<double>(log_exact));
}

}  // namespace counterpoise::CP_ARCH

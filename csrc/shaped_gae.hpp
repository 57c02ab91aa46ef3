// Shaped rewards, GAE, returns, KL per response and whitening moments over the packed action stream, on CPU threads.
//
// For each unmasked token t, from the last to the first; t + 1 is the next unmasked token (Schulman et al. 2016):
//   reward_t = -kl_coef * kl_t + token_reward_t + (score, if t is the last)
//   A_t = reward_t - V_t + gamma * V_{t+1} + gamma * lambda * A_{t+1},   return_t = A_t + V_t
//
// One pass over a sequence, from its end, four tokens a step in lanes that the compiler keeps in vector registers. The
// state of the recursion is (A, pending). `pending` is gamma * V_{t+1}, plus the score until an unmasked token has it.
// Groups of complete sequences are formed by length alone, so the bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.hpp"
#include "thread_pool.hpp"

namespace icegrt {

enum class KLEstimator { k1, k2, k3, abs };

inline KLEstimator kl_estimator(const std::string& name) {
  if (name == "k1") return KLEstimator::k1;
  if (name == "k2") return KLEstimator::k2;
  if (name == "k3") return KLEstimator::k3;
  require(name == "abs", "kl_estimator: expected k1, k2, k3 or abs, got ", name);
  return KLEstimator::abs;
}

template <typename T>
struct GAEInput {
  Span<T> score, value, logprob, ref_logprob, bootstrap, token_reward;  // the last three, and mask, may be absent
  Span<uint8_t> mask;
  Span<int64_t> cu_actions;
  T kl_coef, gamma, decay;  // decay = gamma * lambda
  KLEstimator estimator;
};

template <typename T>
struct GAEOutput {
  T *advantage, *returns, *reward, *kl;
};

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(const Moments& other) {  // Chan, Golub, LeVeque 1979
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    m2 += other.m2 + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
};

// k3 = exp(-d) - 1 + d (Schulman 2020, "Approximating KL Divergence"). Above an exponent of 60 it continues along its
// tangent, so that it stays finite.
template <typename T>
inline T k3(T d) {
  const T x = -d, bounded = std::min(x, T(60));
  return std::expm1(bounded) + (x - bounded) * std::exp(T(60)) - x;
}

// A log-prob of -inf, as of a filtered token, enters differences as -1e4, so that every estimator stays finite.
template <typename T>
inline T floored(T logprob) {
  return logprob == -std::numeric_limits<T>::infinity() ? T(-1e4) : logprob;
}

template <typename T>
inline T estimate(KLEstimator estimator, T logprob, T ref_logprob) {
  const T d = floored(logprob) - floored(ref_logprob);
  switch (estimator) {
    case KLEstimator::k1: return d;
    case KLEstimator::k2: return T(0.5) * d * d;
    case KLEstimator::k3: return k3(d);
    default: return std::abs(d);
  }
}

constexpr int kLanes = 4;
constexpr int64_t kGroupTokens = 16384;

// Sums of x and x * x by lane. The lanes are independent, so that the compiler keeps them in one vector register.
struct LaneSums {
  double first[kLanes] = {}, second[kLanes] = {};

  void add(int lane, double x) {
    first[lane] += x;
    second[lane] += x * x;
  }
};

inline double total(const double (&lanes)[kLanes]) { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }

template <typename T, KLEstimator E>
class ShapedGAE {
 public:
  ShapedGAE(const GAEInput<T>& in, const GAEOutput<T>& out) : in_(in), out_(out) {}

  // Computes sequences [first, last), from the end; returns the moments of their unmasked advantages.
  Moments run(int64_t first, int64_t last) const {
    Group group;
    for (int64_t n = last; n-- > first;) compute_sequence(n, group);
    Moments moments;
    if (group.count == 0) return moments;
    const double shifted_mean = total(group.sums.first) / group.count;
    moments.count = group.count;
    moments.mean = group.origin + shifted_mean;
    moments.m2 = std::max(0.0, total(group.sums.second) - group.count * shifted_mean * shifted_mean);
    return moments;
  }

 private:
  struct State {
    T advantage, pending;
    bool scored;  // an unmasked token has the score
  };

  // Sums of advantages minus `origin`, a value near the first advantage: squares keep their digits for any mean.
  struct Group {
    double count = 0, origin = 0;
    bool has_origin = false;
    LaneSums sums;

    void set_origin(double x) {
      if (!has_origin) origin = x;
      has_origin = true;
    }
  };

  void compute_sequence(int64_t n, Group& group) const {
    const int64_t begin = in_.cu_actions[n];
    const T score = in_.score[n];
    State state{0, score + (in_.bootstrap.data ? in_.gamma * in_.bootstrap[n] : T(0)), false};
    double kl[kLanes] = {};
    int64_t high = in_.cu_actions[n + 1];
    if (!in_.mask.data && high > begin) {
      group.set_origin(state.pending - in_.value[high - 1]);
      high = compute_four_rows(begin, high, score, state, kl, group);
    }
    while (high > begin) high = compute_row(high, score, state, kl, group);
    const bool unassigned_score = !state.scored && score != 0;
    out_.kl[n] = unassigned_score ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(total(kl));
  }

  T penalty(int64_t i, double& kl) const {
    if (!in_.ref_logprob.data) return 0;
    const T x = estimate(E, in_.logprob[i], in_.ref_logprob[i]);
    kl += x;
    return in_.kl_coef == 0 ? T(0) : -in_.kl_coef * x;  // 0 * infinity would be NaN
  }

  // Computes the row before `high` and returns its index, the new `high`.
  int64_t compute_row(int64_t high, T score, State& state, double (&kl)[kLanes], Group& group) const {
    const int64_t i = high - 1;
    if (in_.mask.data && !in_.mask[i]) {
      out_.advantage[i] = out_.returns[i] = out_.reward[i] = 0;
      return i;
    }
    const T value = in_.value[i];
    const T reward = penalty(i, kl[0]) + (in_.token_reward.data ? in_.token_reward[i] : T(0));
    const T advantage = reward - value + state.pending + in_.decay * state.advantage;
    out_.reward[i] = state.scored ? reward : reward + score;
    out_.advantage[i] = advantage;
    out_.returns[i] = advantage + value;
    state = {advantage, in_.gamma * value, true};
    group.set_origin(advantage);
    group.sums.add(0, advantage - group.origin);
    group.count += 1;
    return i;
  }

  // Computes steps of four rows while four remain; returns the new `high`. Within a step, only one multiply-add per row
  // depends on the carry from the step before. Memory is read in one direction, which the hardware prefetches.
  int64_t compute_four_rows(int64_t begin, int64_t high, T score, State& state, double (&kl)[kLanes],
                            Group& group) const {
    const T gamma = in_.gamma, decay = in_.decay, coef = in_.kl_coef;
    const T carry_decay[kLanes] = {decay * decay * decay * decay, decay * decay * decay, decay * decay, decay};
    const T *values = in_.value.data, *token_reward = in_.token_reward.data;
    const T *logprob = in_.logprob.data, *ref = in_.ref_logprob.data;
    const double origin = group.origin;
    double kl_sums[kLanes] = {};
    LaneSums sums;
    T carry = state.advantage, pending = state.pending;
    bool scored = state.scored;
    const int64_t top = high;
    for (; high - begin >= kLanes; high -= kLanes) {
      // 1. values, KL and rewards
      const int64_t low = high - kLanes;
      T value[kLanes], reward[kLanes] = {}, advantage[kLanes];
      for (int j = 0; j < kLanes; ++j) value[j] = values[low + j];
      if (ref) {
        T x[kLanes];
        for (int j = 0; j < kLanes; ++j) x[j] = estimate(E, logprob[low + j], ref[low + j]);
        for (int j = 0; j < kLanes; ++j) kl_sums[j] += x[j];
        if (coef != 0) {
          for (int j = 0; j < kLanes; ++j) reward[j] = -coef * x[j];
        }
      }
      if (token_reward) {
        for (int j = 0; j < kLanes; ++j) reward[j] += token_reward[low + j];
      }
      // 2. the recursion: within the step, then with the carry
      for (int j = 0; j < kLanes - 1; ++j) advantage[j] = reward[j] - value[j] + gamma * value[j + 1];
      advantage[kLanes - 1] = reward[kLanes - 1] - value[kLanes - 1] + pending;
      for (int j = kLanes - 2; j >= 0; --j) advantage[j] += decay * advantage[j + 1];
      for (int j = 0; j < kLanes; ++j) advantage[j] += carry_decay[j] * carry;
      if (!scored) reward[kLanes - 1] += score;
      // 3. results, moments and the new carry
      for (int j = 0; j < kLanes; ++j) out_.advantage[low + j] = advantage[j];
      for (int j = 0; j < kLanes; ++j) out_.returns[low + j] = advantage[j] + value[j];
      for (int j = 0; j < kLanes; ++j) out_.reward[low + j] = reward[j];
      for (int j = 0; j < kLanes; ++j) sums.add(j, advantage[j] - origin);
      carry = advantage[0];
      pending = gamma * value[0];
      scored = true;
    }
    for (int j = 0; j < kLanes; ++j) {
      kl[j] += kl_sums[j];
      group.sums.first[j] += sums.first[j];
      group.sums.second[j] += sums.second[j];
    }
    state = {carry, pending, scored};
    group.count += static_cast<double>(top - high);
    return high;
  }

  const GAEInput<T>& in_;
  const GAEOutput<T>& out_;
};

template <typename T>
void check_gae(const GAEInput<T>& in) {
  const int64_t actions = in.value.size, sequences = in.score.size;
  const auto check_size = [](const char* name, bool absent, int64_t size, int64_t expected) {
    require(absent || size == expected, name, ": expected ", expected, " entries, got ", size);
  };
  check_size("cu_actions", false, in.cu_actions.size, sequences + 1);
  check_size("logprob_A", false, in.logprob.size, actions);
  check_size("ref_logprob_A", !in.ref_logprob.data, in.ref_logprob.size, actions);
  check_size("token_reward_A", !in.token_reward.data, in.token_reward.size, actions);
  check_size("mask_A", !in.mask.data, in.mask.size, actions);
  check_size("bootstrap_N", !in.bootstrap.data, in.bootstrap.size, sequences);
  require(in.cu_actions[0] == 0, "cu_actions: the first entry must be 0, got ", in.cu_actions[0]);
  for (int64_t n = 0; n < sequences; ++n) {
    require(in.cu_actions[n + 1] >= in.cu_actions[n], "cu_actions: entries must not fall, got ", in.cu_actions[n],
            " then ", in.cu_actions[n + 1], " at index ", n + 1);
  }
  require(in.cu_actions[sequences] <= actions, "cu_actions: the last entry must be at most ", actions, ", got ",
          in.cu_actions[sequences]);
}

// Writes all outputs and returns the moments of the unmasked advantages. kl_N is NaN for a response with a score but no
// unmasked action that could have it; the caller raises an error.
template <typename T>
Moments shaped_gae(const GAEInput<T>& in, const GAEOutput<T>& out, int64_t threads) {
  check_gae(in);
  // 1. groups of complete sequences
  const int64_t sequences = in.score.size;
  std::vector<int64_t> group_starts{0};
  for (int64_t n = 1; n <= sequences; ++n) {
    const int64_t group_tokens = in.cu_actions[n] - in.cu_actions[group_starts.back()];
    if (n == sequences || group_tokens >= kGroupTokens) group_starts.push_back(n);
  }
  const int64_t groups = static_cast<int64_t>(group_starts.size()) - 1;
  // 2. the groups, on `threads` threads
  std::vector<Moments> group_moments(groups);
  const auto run = [&](int64_t first, int64_t last) {
    switch (in.estimator) {  // one instance per estimator: a branch in the inner loop would prevent vectorization
      case KLEstimator::k1: return ShapedGAE<T, KLEstimator::k1>(in, out).run(first, last);
      case KLEstimator::k2: return ShapedGAE<T, KLEstimator::k2>(in, out).run(first, last);
      case KLEstimator::k3: return ShapedGAE<T, KLEstimator::k3>(in, out).run(first, last);
      default: return ShapedGAE<T, KLEstimator::abs>(in, out).run(first, last);
    }
  };
  const int64_t helpers = std::min(threads, groups) - 1;
  ThreadPool::shared().run(groups, helpers, helpers,
                           [&](int64_t g) { group_moments[g] = run(group_starts[g], group_starts[g + 1]); });
  // 3. rows after the last sequence, and the moments
  for (T* x : {out.advantage, out.returns, out.reward}) std::fill(x + in.cu_actions[sequences], x + in.value.size, T(0));
  Moments moments;
  for (const Moments& m : group_moments) moments.merge(m);
  return moments;
}

}  // namespace icegrt

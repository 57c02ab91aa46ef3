// Shaped rewards, GAE, returns, KL per response and whitening moments over the packed action stream, on CPU threads.
//
// For each unmasked token t, from the last to the first; t + 1 is the next unmasked token (Schulman et al. 2016):
//   reward_t = -kl_coef * kl_t + token_reward_t + (score, if t is the last)
//   A_t = reward_t - V_t + gamma * V_{t+1} + gamma * lambda * A_{t+1},   return_t = target_t + V_t
// where `target` is the recursion of A with a lambda of its own, or A itself.
//
// One pass over a sequence, from its end, four tokens a step in lanes that the compiler keeps in vector registers. The
// state of the recursion is (A, target, pending). `pending` is gamma * V_{t+1}, plus the score until an unmasked token
// has it. With turns, maximal runs of unmasked tokens, a step of the recursion is a turn; the rows of a turn are walked
// one by one, and its advantage is written to all of them once its first token is reached. Groups of complete sequences are formed by length alone, so the bits do not depend on the number of threads.
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

// gamma * lambda: one number for all sequences, or one for each.
template <typename T>
struct Decay {
  T all, gamma;
  Span<T> lambdas;  // absent: `all`

  T operator[](int64_t n) const { return lambdas.data ? gamma * lambdas[n] : all; }
};

template <typename T>
struct GAEInput {
  Span<T> score, value, logprob, ref_logprob, bootstrap, token_reward;  // the last three, and mask, may be absent
  Span<uint8_t> mask;
  Span<int64_t> cu_actions;
  T kl_coef, gamma;
  Decay<T> decay, value_decay;  // of advantages and of targets
  bool decoupled;               // targets have a decay of their own
  KLEstimator estimator;
};

template <typename T>
struct GAEOutput {
  T *advantage, *returns, *reward, *kl;
  uint8_t* value_mask;  // 1 at the first token of a turn; null: the unit is the token
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

  void add(int lane, double x, double times) {
    first[lane] += times * x;
    second[lane] += times * x * x;
  }
};

// The recursion x_j = delta_j + decay * x_{j+1} over one step of lanes, and into it from the step before.
template <typename T>
struct Powers {
  T decay, of_carry[kLanes];

  explicit Powers(T d) : decay(d), of_carry{d * d * d * d, d * d * d, d * d, d} {}

  void recur(T (&x)[kLanes], T carry) const {
    for (int j = kLanes - 2; j >= 0; --j) x[j] += decay * x[j + 1];
    for (int j = 0; j < kLanes; ++j) x[j] += of_carry[j] * carry;
  }
};

inline double total(const double (&lanes)[kLanes]) { return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]); }

template <typename T, KLEstimator E, bool kDecoupled>
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
    T advantage, target, pending;
    bool scored;  // an unmasked token has the score
  };

  // Of one sequence; value_decay is that of targets.
  struct Decays {
    T decay, value_decay;
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
    const Decays decays{in_.decay[n], kDecoupled ? in_.value_decay[n] : T(0)};
    State state{0, 0, score + (in_.bootstrap.data ? in_.gamma * in_.bootstrap[n] : T(0)), false};
    double kl[kLanes] = {};
    int64_t high = in_.cu_actions[n + 1];
    if (out_.value_mask) {
      while (high > begin) high = compute_turn(begin, high, score, decays, state, kl[0], group);
    } else if (!in_.mask.data && high > begin) {
      group.set_origin(state.pending - in_.value[high - 1]);
      high = compute_four_rows(begin, high, score, decays, state, kl, group);
    }
    while (high > begin) high = compute_row(high, score, decays, state, kl[0], group);
    const bool unassigned_score = !state.scored && score != 0;
    out_.kl[n] = unassigned_score ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(total(kl));
  }

  T penalty(int64_t i, double& kl) const {
    if (!in_.ref_logprob.data) return 0;
    const T x = estimate(E, in_.logprob[i], in_.ref_logprob[i]);
    kl += x;
    return in_.kl_coef == 0 ? T(0) : -in_.kl_coef * x;  // 0 * infinity would be NaN
  }

  bool masked(int64_t i) const { return in_.mask.data && !in_.mask[i]; }

  // Writes the zeros of masked row `i` and returns it, the new `high`.
  int64_t skip_row(int64_t i) const {
    out_.advantage[i] = out_.returns[i] = out_.reward[i] = 0;
    if (out_.value_mask) out_.value_mask[i] = 0;
    return i;
  }

  // Computes the row before `high` and returns its index, the new `high`.
  int64_t compute_row(int64_t high, T score, Decays decays, State& state, double& kl, Group& group) const {
    const int64_t i = high - 1;
    if (masked(i)) return skip_row(i);
    const T value = in_.value[i];
    const T reward = penalty(i, kl) + (in_.token_reward.data ? in_.token_reward[i] : T(0));
    const T advantage = reward - value + state.pending + decays.decay * state.advantage;
    const T target = kDecoupled ? reward - value + state.pending + decays.value_decay * state.target : advantage;
    out_.reward[i] = state.scored ? reward : reward + score;
    out_.advantage[i] = advantage;
    out_.returns[i] = target + value;
    state = {advantage, target, in_.gamma * value, true};
    group.set_origin(advantage);
    group.sums.add(0, advantage - group.origin);
    group.count += 1;
    return i;
  }

  // Computes the turn that ends before `high`, or skips a masked row; returns the new `high`. The reward of a turn is
  // summed in double: it may have as many terms as the sequence.
  int64_t compute_turn(int64_t begin, int64_t high, T score, Decays decays, State& state, double& kl,
                       Group& group) const {
    if (masked(high - 1)) return skip_row(high - 1);
    double turn_reward = state.pending;
    int64_t low = high;
    while (low > begin && !masked(low - 1)) {
      --low;
      const T reward = penalty(low, kl) + (in_.token_reward.data ? in_.token_reward[low] : T(0));
      turn_reward += reward;
      out_.reward[low] = state.scored ? reward : reward + score;
      out_.returns[low] = 0;
      out_.value_mask[low] = 0;
      state.scored = true;
    }
    const T value = in_.value[low];
    const T delta = static_cast<T>(turn_reward - value);
    const T advantage = delta + decays.decay * state.advantage;
    const T target = kDecoupled ? delta + decays.value_decay * state.target : advantage;
    std::fill(out_.advantage + low, out_.advantage + high, advantage);
    out_.returns[low] = target + value;
    out_.value_mask[low] = 1;
    state = {advantage, target, in_.gamma * value, true};
    group.set_origin(advantage);
    group.sums.add(0, advantage - group.origin, static_cast<double>(high - low));
    group.count += static_cast<double>(high - low);
    return low;
  }

  // Computes steps of four rows while four remain; returns the new `high`. Within a step, only one multiply-add per row
  // depends on the carry from the step before. Memory is read in one direction, which the hardware prefetches.
  int64_t compute_four_rows(int64_t begin, int64_t high, T score, Decays decays, State& state, double (&kl)[kLanes],
                            Group& group) const {
    const T gamma = in_.gamma, coef = in_.kl_coef;
    const Powers<T> powers(decays.decay), value_powers(decays.value_decay);
    const T *values = in_.value.data, *token_reward = in_.token_reward.data;
    const T *logprob = in_.logprob.data, *ref = in_.ref_logprob.data;
    const double origin = group.origin;
    double kl_sums[kLanes] = {};
    LaneSums sums;
    T carry = state.advantage, target_carry = state.target, pending = state.pending;
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
      T target[kLanes];
      for (int j = 0; j < kLanes; ++j) target[j] = advantage[j];
      powers.recur(advantage, carry);
      if constexpr (kDecoupled) value_powers.recur(target, target_carry);
      if (!scored) reward[kLanes - 1] += score;
      // 3. results, moments and the new carry
      for (int j = 0; j < kLanes; ++j) out_.advantage[low + j] = advantage[j];
      for (int j = 0; j < kLanes; ++j) out_.returns[low + j] = (kDecoupled ? target[j] : advantage[j]) + value[j];
      for (int j = 0; j < kLanes; ++j) out_.reward[low + j] = reward[j];
      for (int j = 0; j < kLanes; ++j) sums.add(j, advantage[j] - origin);
      carry = advantage[0];
      target_carry = kDecoupled ? target[0] : carry;
      pending = gamma * value[0];
      scored = true;
    }
    for (int j = 0; j < kLanes; ++j) {
      kl[j] += kl_sums[j];
      group.sums.first[j] += sums.first[j];
      group.sums.second[j] += sums.second[j];
    }
    state = {carry, target_carry, pending, scored};
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
  check_size("lam", !in.decay.lambdas.data, in.decay.lambdas.size, sequences);
  check_size("lam_value", !in.value_decay.lambdas.data, in.value_decay.lambdas.size, sequences);
  require(in.cu_actions[0] == 0, "cu_actions: the first entry must be 0, got ", in.cu_actions[0]);
  for (int64_t n = 0; n < sequences; ++n) {
    require(in.cu_actions[n + 1] >= in.cu_actions[n], "cu_actions: entries must not fall, got ", in.cu_actions[n],
            " then ", in.cu_actions[n + 1], " at index ", n + 1);
  }
  require(in.cu_actions[sequences] <= actions, "cu_actions: the last entry must be at most ", actions, ", got ",
          in.cu_actions[sequences]);
}

// Computes sequences [first, last) with one instance per estimator: a branch in the inner loop would prevent
// vectorization.
template <typename T, bool kDecoupled>
Moments compute_sequences(const GAEInput<T>& in, const GAEOutput<T>& out, int64_t first, int64_t last) {
  switch (in.estimator) {
    case KLEstimator::k1: return ShapedGAE<T, KLEstimator::k1, kDecoupled>(in, out).run(first, last);
    case KLEstimator::k2: return ShapedGAE<T, KLEstimator::k2, kDecoupled>(in, out).run(first, last);
    case KLEstimator::k3: return ShapedGAE<T, KLEstimator::k3, kDecoupled>(in, out).run(first, last);
    default: return ShapedGAE<T, KLEstimator::abs, kDecoupled>(in, out).run(first, last);
  }
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
  const auto run = in.decoupled ? compute_sequences<T, true> : compute_sequences<T, false>;
  const int64_t helpers = std::min(threads, groups) - 1;
  ThreadPool::shared().run(groups, helpers, helpers,
                           [&](int64_t g) { group_moments[g] = run(in, out, group_starts[g], group_starts[g + 1]); });
  // 3. rows after the last sequence, and the moments
  const int64_t end = in.cu_actions[sequences], size = in.value.size;
  for (T* x : {out.advantage, out.returns, out.reward}) std::fill(x + end, x + size, T(0));
  if (out.value_mask) std::fill(out.value_mask + end, out.value_mask + size, uint8_t{0});
  Moments moments;
  for (const Moments& m : group_moments) moments.merge(m);
  return moments;
}

}  // namespace icegrt

// Shaped rewards, GAE, returns, KL per response and whitening moments over the packed action stream, on CPU threads.
//
// A sequence is walked from its end in blocks that stay in the first-level cache. Everything but the recursion is a
// plain loop that the compiler vectorises. The recursion's state is (A, pending): pending holds gamma * V behind the
// token plus, until an unmasked token takes it, the score; so the score finds the last unmasked token by itself.
// Work is cut into groups of whole sequences by their lengths alone, so the bits do not depend on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "check.hpp"

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

// exp(-d) - 1 + d; beyond an exponent of 60 it continues along its tangent, so it stays finite.
template <typename T>
inline T k3(T d) {
  const T x = -d, bounded = std::min(x, T(60));
  return std::expm1(bounded) + (x - bounded) * std::exp(T(60)) - x;
}

template <typename T>
inline T estimate(KLEstimator estimator, T d) {
  switch (estimator) {
    case KLEstimator::k1: return d;
    case KLEstimator::k2: return T(0.5) * d * d;
    case KLEstimator::k3: return k3(d);
    default: return std::abs(d);
  }
}

constexpr int64_t kBlock = 512;
constexpr int64_t kGroupTokens = 16384;

template <typename T>
class ShapedGAE {
 public:
  ShapedGAE(const GAEInput<T>& in, const GAEOutput<T>& out) : in_(in), out_(out) {}

  // Sequences [first, last); returns the moments of their unmasked advantages.
  Moments run(int64_t first, int64_t last) const {
    Moments moments;
    double sum = 0;
    for (int64_t n = last; n-- > first;) sequence(n, moments.count, sum);
    if (moments.count == 0) return moments;
    moments.mean = sum / moments.count;
    const int64_t begin = in_.cu_actions[first], end = in_.cu_actions[last];
    const double mean = moments.mean;
    double m2 = 0;
    if (in_.mask.data) {
      for (int64_t i = begin; i < end; ++i) {
        const double off = in_.mask[i] ? out_.advantage[i] - mean : 0.0;
        m2 += off * off;
      }
    } else {
#pragma omp simd reduction(+ : m2)
      for (int64_t i = begin; i < end; ++i) {
        const double off = out_.advantage[i] - mean;
        m2 += off * off;
      }
    }
    moments.m2 = m2;
    return moments;
  }

 private:
  struct State {
    T advantage, pending;
    bool scored;  // an unmasked token has taken the score
  };

  void sequence(int64_t n, double& count, double& sum) const {
    const int64_t begin = in_.cu_actions[n], end = in_.cu_actions[n + 1];
    const T score = in_.score[n];
    State state{0, score + (in_.bootstrap.data ? in_.gamma * in_.bootstrap[n] : T(0)), false};
    double kl_sum = 0;
    for (int64_t high = end; high > begin;) {
      const int64_t low = std::max(begin, high - kBlock);
      kl_sum += rewards(low, high);
      if (in_.mask.data) {
        count += masked_block(low, high, score, state);
      } else {
        block(low, high, score, state);
        count += static_cast<double>(high - low);
      }
      sum += total(out_.advantage + low, high - low);
      high = low;
    }
    const bool homeless = !state.scored && score != 0;
    out_.kl[n] = homeless ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(kl_sum);
  }

  // reward without the score, for rows [low, high); returns the sum of the estimator.
  double rewards(int64_t low, int64_t high) const {
    const int64_t size = high - low;
    const T coef = in_.kl_coef;
    T kl[kBlock];
    T* __restrict reward = out_.reward + low;
    if (in_.ref_logprob.data) {
      const T *logprob = in_.logprob.data + low, *ref = in_.ref_logprob.data + low;
      switch (in_.estimator) {  // one loop each: a switch inside would not vectorise
        case KLEstimator::k1: fill<KLEstimator::k1>(kl, logprob, ref, size); break;
        case KLEstimator::k2: fill<KLEstimator::k2>(kl, logprob, ref, size); break;
        case KLEstimator::k3: fill<KLEstimator::k3>(kl, logprob, ref, size); break;
        case KLEstimator::abs: fill<KLEstimator::abs>(kl, logprob, ref, size); break;
      }
      if (in_.mask.data) {
        const uint8_t* keep = in_.mask.data + low;
        for (int64_t i = 0; i < size; ++i) kl[i] = keep[i] ? kl[i] : T(0);
      }
    } else {
      std::fill(kl, kl + size, T(0));
    }
    if (coef == 0) {  // and not 0 times what may be infinite
      std::fill(reward, reward + size, T(0));
    } else {
      for (int64_t i = 0; i < size; ++i) reward[i] = -coef * kl[i];
    }
    if (in_.token_reward.data) {
      const T* extra = in_.token_reward.data + low;
      for (int64_t i = 0; i < size; ++i) reward[i] += extra[i];
    }
    return total(kl, size);
  }

  template <KLEstimator E>
  static void fill(T* __restrict kl, const T* logprob, const T* ref, int64_t size) {
    for (int64_t i = 0; i < size; ++i) kl[i] = estimate(E, logprob[i] - ref[i]);
  }

  static double total(const T* x, int64_t size) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += x[i];
    return sum;
  }

  void block(int64_t low, int64_t high, T score, State& state) const {
    const int64_t size = high - low;
    const T gamma = in_.gamma, decay = in_.decay;
    const T* value = in_.value.data + low;
    T *__restrict reward = out_.reward + low, *__restrict advantage = out_.advantage + low;
    T* __restrict returns = out_.returns + low;
    for (int64_t i = 0; i < size - 1; ++i) advantage[i] = reward[i] - value[i] + gamma * value[i + 1];
    advantage[size - 1] = reward[size - 1] - value[size - 1] + state.pending;
    if (!state.scored) reward[size - 1] += score;
    // Four tokens a step: within a step the sums do not wait for the carry, which costs one multiply-add.
    const T decay2 = decay * decay, decay3 = decay2 * decay, decay4 = decay2 * decay2;
    T carry = state.advantage;
    int64_t i = size;
    for (; i >= 4; i -= 4) {
      T* d = advantage + i - 4;
      const T d3 = d[3], d2 = d[2] + decay * d3, d1 = d[1] + decay * d2, d0 = d[0] + decay * d1;
      d[3] = d3 + decay * carry;
      d[2] = d2 + decay2 * carry;
      d[1] = d1 + decay3 * carry;
      carry = d[0] = d0 + decay4 * carry;
    }
    for (; i > 0; --i) carry = advantage[i - 1] += decay * carry;
    for (int64_t j = 0; j < size; ++j) returns[j] = advantage[j] + value[j];
    state = {carry, gamma * value[0], true};
  }

  double masked_block(int64_t low, int64_t high, T score, State& state) const {
    double kept = 0;
    for (int64_t i = high; i-- > low;) {
      if (!in_.mask[i]) {
        out_.advantage[i] = out_.returns[i] = out_.reward[i] = 0;
        continue;
      }
      const T value = in_.value[i];
      const T advantage = out_.reward[i] - value + state.pending + in_.decay * state.advantage;
      if (!state.scored) out_.reward[i] += score;
      out_.advantage[i] = advantage;
      out_.returns[i] = advantage + value;
      state = {advantage, in_.gamma * value, true};
      kept += 1;
    }
    return kept;
  }

  const GAEInput<T>& in_;
  const GAEOutput<T>& out_;
};

template <typename T>
void check_gae(const GAEInput<T>& in) {
  const int64_t actions = in.value.size, sequences = in.score.size;
  const auto sized = [](const char* name, bool absent, int64_t size, int64_t wanted) {
    require(absent || size == wanted, name, ": expected ", wanted, " entries, got ", size);
  };
  sized("cu_actions", false, in.cu_actions.size, sequences + 1);
  sized("logprob_A", false, in.logprob.size, actions);
  sized("ref_logprob_A", !in.ref_logprob.data, in.ref_logprob.size, actions);
  sized("token_reward_A", !in.token_reward.data, in.token_reward.size, actions);
  sized("mask_A", !in.mask.data, in.mask.size, actions);
  sized("bootstrap_N", !in.bootstrap.data, in.bootstrap.size, sequences);
  require(in.cu_actions[0] == 0, "cu_actions: the first entry must be 0, got ", in.cu_actions[0]);
  for (int64_t n = 0; n < sequences; ++n) {
    require(in.cu_actions[n + 1] >= in.cu_actions[n], "cu_actions: entries must not fall, got ", in.cu_actions[n],
            " then ", in.cu_actions[n + 1], " at index ", n + 1);
  }
  require(in.cu_actions[sequences] <= actions, "cu_actions: the last entry must be at most ", actions, ", got ",
          in.cu_actions[sequences]);
}

// kl of a response that has a score and no unmasked action for it to land on is NaN: the caller refuses it.
template <typename T>
Moments shaped_gae(const GAEInput<T>& in, const GAEOutput<T>& out, int64_t threads) {
  check_gae(in);
  const int64_t sequences = in.score.size;
  std::vector<int64_t> cuts{0};
  for (int64_t n = 1; n <= sequences; ++n) {
    if (n == sequences || in.cu_actions[n] - in.cu_actions[cuts.back()] >= kGroupTokens) cuts.push_back(n);
  }
  const int64_t groups = static_cast<int64_t>(cuts.size()) - 1;
  std::vector<Moments> parts(groups);
  std::atomic<int64_t> next{0};
  const ShapedGAE<T> gae(in, out);
  const auto work = [&] {
    for (int64_t g = next++; g < groups; g = next++) parts[g] = gae.run(cuts[g], cuts[g + 1]);
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t t = 1; t < std::min(threads, groups); ++t) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads are to be had: the ones that there are do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  for (T* x : {out.advantage, out.returns, out.reward}) std::fill(x + in.cu_actions[sequences], x + in.value.size, T(0));
  Moments moments;
  for (const Moments& part : parts) moments.merge(part);
  return moments;
}

}  // namespace icegrt

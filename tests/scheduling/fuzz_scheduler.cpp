// Random operations on a BlockScheduler, with a model of the cache beside it: `fuzz_scheduler SEED OPERATIONS`.
//
// The model stores in every cache slot a digest of the tokens up to that position. Before a step "runs", the digests
// that a sequence's attention would read are compared with those of its own tokens. So a wrong share, copy, reuse or
// eviction is a wrong digest. Sampled tokens are a function of sequence and position, known one or two steps late.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>

#include "../../csrc/scheduler_invariants.hpp"

using namespace icegrt;

namespace {

struct Expected {
  std::vector<int32_t> tokens;
  size_t prompt = 0, longest = 0;
  bool finished = false, aborted = false;
};

struct PlannedSample {
  int64_t id;
  int32_t position;
};

[[noreturn]] void fail(const char* what, int64_t operation) {
  std::fprintf(stderr, "operation %lld: %s\n", static_cast<long long>(operation), what);
  std::exit(1);
}

uint64_t extend(uint64_t digest, int32_t token) {
  digest = (digest ^ static_cast<uint32_t>(token + 1)) * 0x9E3779B97F4A7C15ull;
  return digest ^ (digest >> 31);
}

int32_t sampled_token(int64_t id, int32_t position) {
  // Mostly one token: sampled blocks then equal the blocks that prompts begin with.
  return position % 11 == 5 ? static_cast<int32_t>(extend(id, position) % 3) : static_cast<int32_t>(id % 2);
}

class Fuzzer {
 public:
  Fuzzer(uint64_t seed, const SchedulerLimits& limits)
      : random_(seed), limits_(limits), scheduler_(limits),
        digests_(static_cast<size_t>(limits.n_blocks) * limits.block_size, 0), last_token_(limits.max_sequences, 0) {}

  void run(int64_t operations) {
    for (operation_ = 0; operation_ < operations; ++operation_) {
      const int kind = below(100);
      if (kind < 12) {
        submit();
      } else if (kind < 56) {
        plan();
      } else if (kind < 84) {
        complete();
      } else if (kind < 86) {
        abort();
      } else if (kind < 88) {
        resume();
      } else if (kind < 99) {
        remove();
      } else if (scheduler_.n_in_flight() == 0) {
        scheduler_.forget_cache();
        std::fill(digests_.begin(), digests_.end(), 0);
      }
      if (operation_ % 16 == 0) scheduler_.check_invariants();
    }
    drain();
  }

  const SchedulerStats& stats() const { return scheduler_.stats(); }
  int64_t finished() const { return n_finished_; }

 private:
  int below(int n) { return static_cast<int>(random_() % n); }

  void submit() {
    if (expected_.size() > 60) return;
    std::vector<int64_t> ids;
    for (int sample = 1 + below(4); sample > 0; --sample) ids.push_back(next_id_++);
    // Two common beginnings, so that prompts share blocks.
    std::vector<int32_t> prompt(1 + below(limits_.max_length - 2));
    const int32_t beginning = below(2);
    for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = i < 9 ? beginning : below(3);
    const int64_t longest = std::min<int64_t>(limits_.max_length, prompt.size() + 1 + below(20));
    scheduler_.submit(ids, prompt.data(), static_cast<int64_t>(prompt.size()), longest - prompt.size());
    for (const int64_t id : ids) expected_[id] = {prompt, prompt.size(), static_cast<size_t>(longest), false, false};
  }

  void plan() {
    if (scheduler_.n_in_flight() >= 2) return;
    const StepPlan& plan = scheduler_.plan();
    if (plan.n_rows == 0) return;
    if (plan.n_rows > limits_.token_budget) fail("a plan exceeds the token budget", operation_);
    // 1. The block table on the device changes by the updates alone.
    table_.resize(plan.block_table.size());
    for (int32_t i = 0; i < plan.n_updates; ++i) table_[plan.update_entries[i]] = plan.update_blocks[i];
    // 2. Copies: all are read before any is written.
    std::vector<std::vector<uint64_t>> copies;
    for (int32_t i = 0; i < plan.n_copies; ++i) copies.push_back(block(plan.copy_from[i]));
    for (int32_t i = 0; i < plan.n_copies; ++i) {
      std::copy(copies[i].begin(), copies[i].end(), digests_.begin() + plan.copy_to[i] * limits_.block_size);
    }
    // 3. Rows: every one writes its slot once, and reads what is before it.
    std::vector<int8_t> written(digests_.size(), 0);
    for (int32_t s = 0; s < plan.n_scheduled; ++s) {
      const int32_t slot = plan.table_rows[s];
      for (int32_t row = plan.row_starts[s]; row < plan.row_starts[s + 1]; ++row) {
        const int32_t position = plan.positions[row], target = plan.cache_slots[row];
        if (target != cache_slot(slot, position)) fail("a slot is not that of the block table", operation_);
        if (written[target]++) fail("two rows of a step write one slot", operation_);
        const uint64_t before = position > 0 ? digests_[cache_slot(slot, position - 1)] : 1;
        const int32_t token = plan.tokens[row] >= 0 ? plan.tokens[row] : last_token_[slot];
        digests_[target] = extend(before, token);
      }
    }
    // 4. What attention reads, and the samples.
    std::map<int32_t, uint64_t> digest_of_row;
    for (int32_t s = 0; s < plan.n_scheduled; ++s) {
      digest_of_row[plan.row_starts[s + 1] - 1] =
          digests_[cache_slot(plan.table_rows[s], plan.lengths[s] - 1)];
    }
    std::vector<PlannedSample> samples;
    for (int32_t i = 0; i < plan.n_samples; ++i) {
      const int64_t id = plan.sample_ids[i];
      const int32_t position = plan.sample_positions[i];
      Expected& sequence = expected_.at(id);
      if (sequence.finished || sequence.aborted) {
        if (sequence.aborted) fail("an aborted sequence is sampled", operation_);
      } else if (digest_of_row.at(plan.sample_rows[i]) != true_digest(id, position)) {
        fail("a sequence reads keys and values of other tokens", operation_);
      }
      last_token_[plan.sample_slots[i]] = sampled_token(id, position);
      samples.push_back({id, position});
    }
    in_flight_.push_back(samples);
  }

  void complete() {
    if (in_flight_.empty()) return;
    const std::vector<PlannedSample> samples = in_flight_.front();
    in_flight_.pop_front();
    std::vector<int32_t> tokens;
    std::vector<uint8_t> stops;
    for (const PlannedSample& sample : samples) {
      tokens.push_back(sampled_token(sample.id, sample.position));
      stops.push_back((sample.id * 31 + sample.position) % 29 == 0);
    }
    scheduler_.complete(tokens.data(), stops.data(), static_cast<int64_t>(tokens.size()));
    for (size_t i = 0; i < samples.size(); ++i) {
      const auto entry = expected_.find(samples[i].id);
      if (entry == expected_.end()) continue;
      Expected& sequence = entry->second;
      // Samples in flight at an abort are dropped; a resumed sequence draws the same tokens again.
      if (sequence.finished || sequence.aborted || sequence.tokens.size() != static_cast<size_t>(samples[i].position)) {
        continue;
      }
      if (scheduler_.tokens(samples[i].id).size() == sequence.tokens.size()) continue;
      sequence.tokens.push_back(tokens[i]);
      sequence.finished = stops[i] || sequence.tokens.size() == sequence.longest;
      n_finished_ += sequence.finished;
    }
    for (const auto& [id, sequence] : expected_) {
      if (scheduler_.tokens(id) != sequence.tokens) fail("a sequence has other tokens", operation_);
      if (scheduler_.is_finished(id) != sequence.finished) fail("a sequence ends at another token", operation_);
    }
  }

  void abort() {
    const int64_t id = any([](const Expected& s) { return !s.finished && !s.aborted; });
    if (id < 0) return;
    scheduler_.abort(id);
    expected_[id].aborted = true;
  }

  void resume() {
    const int64_t id = any([](const Expected& s) { return s.aborted; });
    if (id < 0) return;
    scheduler_.resume(id);
    expected_[id].aborted = false;
  }

  void remove() {
    const int64_t id = any([](const Expected& s) { return s.finished; });
    if (id < 0) return;
    scheduler_.remove(id);
    expected_.erase(id);
  }

  // Every sequence ends, whatever state the operations have left.
  void drain() {
    while (resumable()) resume();
    for (int64_t idle = 0; true;) {
      const int64_t before = n_finished_ + scheduler_.stats().prompt_tokens;
      plan();
      complete();
      scheduler_.check_invariants();
      const bool left = any([](const Expected& s) { return !s.finished; }) >= 0;
      if (!left) break;
      idle = before == n_finished_ + scheduler_.stats().prompt_tokens ? idle + 1 : 0;
      if (idle > 10000) fail("sequences wait for ever", operation_);
    }
    while (!in_flight_.empty()) complete();
    if (scheduler_.n_running() != 0 || scheduler_.n_waiting() != 0) fail("finished sequences run on", operation_);
    if (scheduler_.pool().available() != limits_.n_blocks) fail("blocks are lost", operation_);
  }

  bool resumable() { return any([](const Expected& s) { return s.aborted; }) >= 0; }

  template <typename Condition>
  int64_t any(Condition condition) {
    std::vector<int64_t> ids;
    for (const auto& [id, sequence] : expected_) {
      if (condition(sequence)) ids.push_back(id);
    }
    return ids.empty() ? -1 : ids[below(static_cast<int>(ids.size()))];
  }

  uint64_t true_digest(int64_t id, int32_t length) {
    const Expected& sequence = expected_.at(id);
    uint64_t digest = 1;
    for (int32_t i = 0; i < length; ++i) {
      const bool known = static_cast<size_t>(i) < sequence.tokens.size();
      digest = extend(digest, known ? sequence.tokens[i] : sampled_token(id, i));
    }
    return digest;
  }

  int32_t cache_slot(int32_t slot, int32_t position) const {
    const int32_t size = limits_.block_size;
    return table_[static_cast<size_t>(slot) * scheduler_.max_blocks() + position / size] * size + position % size;
  }

  std::vector<uint64_t> block(int32_t index) const {
    const auto first = digests_.begin() + index * limits_.block_size;
    return {first, first + limits_.block_size};
  }

  std::mt19937_64 random_;
  SchedulerLimits limits_;
  BlockScheduler scheduler_;
  std::vector<uint64_t> digests_;
  std::vector<int32_t> table_, last_token_;
  std::map<int64_t, Expected> expected_;
  std::deque<std::vector<PlannedSample>> in_flight_;
  int64_t operation_ = 0, next_id_ = 0, n_finished_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) fail("usage: fuzz_scheduler SEED OPERATIONS", 0);
  const uint64_t seed = std::strtoull(argv[1], nullptr, 10);
  const int64_t operations = std::strtoll(argv[2], nullptr, 10);
  // Small caches preempt and evict all the time; the large one shares and reuses.
  const SchedulerLimits shapes[] = {
      {8, 4, 4, 33, 8, Order::kFirstCome, true},        {12, 2, 6, 22, 7, Order::kLongestRemaining, true},
      {64, 4, 16, 40, 24, Order::kFirstCome, true},     {20, 1, 5, 20, 9, Order::kLongestRemaining, false},
      {256, 8, 32, 60, 64, Order::kLongestRemaining, true},
  };
  for (const SchedulerLimits& limits : shapes) {
    Fuzzer fuzzer(seed, limits);
    try {
      fuzzer.run(operations / 5);
    } catch (const std::exception& error) {
      fail(error.what(), -1);
    }
    const SchedulerStats& stats = fuzzer.stats();
    std::printf("%d blocks: finished %lld, prompt %lld, reused %lld, shared %lld, recomputed %lld, preempted %lld, "
                "copied %lld\n", limits.n_blocks, static_cast<long long>(fuzzer.finished()),
                static_cast<long long>(stats.prompt_tokens), static_cast<long long>(stats.reused_tokens),
                static_cast<long long>(stats.shared_tokens), static_cast<long long>(stats.recomputed_tokens),
                static_cast<long long>(stats.preemptions), static_cast<long long>(stats.copies));
  }
}

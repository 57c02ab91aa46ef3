// Continuous batching over a paged KV cache: which rows the model computes in each step, and where their keys go.
//
// A request is one prompt with n samples, each a sequence. `plan` chooses the rows of the next step under a token
// budget and writes them into arrays that are allocated once. `complete` reports the tokens that a planned step sampled. Steps
// complete in order, and one step (or more) may be planned before the last one has completed: the row of a token that
// is not known yet has the token kOnDevice, and the device takes the token that it sampled itself.
//
// Progress: a sequence that does not fit the cache alone is refused, and a running sequence can preempt all later ones
// that the step has not reached. So at least one running sequence goes on in every step, and none waits for ever.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "block_pool.hpp"
#include "check.hpp"
#include "scheduler_types.hpp"

namespace icegrt {

class BlockScheduler {
 public:
  // The token of a row whose value only the device knows yet.
  static constexpr int32_t kOnDevice = -1;

  explicit BlockScheduler(const SchedulerLimits& limits)
      : limits_(limits), shift_(log2(checked(limits).block_size)),
        pool_(limits.n_blocks, limits.block_size),
        max_blocks_(std::min(blocks_for(limits.max_length), limits.n_blocks)) {
    const size_t rows = limits.token_budget, sequences = limits.max_sequences;
    plan_.tokens.resize(rows);
    plan_.positions.resize(rows);
    plan_.cache_slots.resize(rows);
    plan_.row_starts.resize(sequences + 1);
    for (auto* array : {&plan_.lengths, &plan_.table_rows, &plan_.sample_rows, &plan_.sample_slots,
                        &plan_.sample_positions, &plan_.copy_from, &plan_.copy_to}) {
      array->resize(sequences);
    }
    plan_.sample_ids.resize(sequences);
    require(sequences * max_blocks_ <= INT32_MAX, "the block table of ", sequences, " x ", max_blocks_,
            " entries is too large; lower max_sequences or max_length, or raise block_size");
    plan_.block_table.assign(sequences * max_blocks_, 0);
    plan_.update_entries.reserve(rows);
    plan_.update_blocks.reserve(rows);
    for (int32_t slot = limits.max_sequences - 1; slot >= 0; --slot) free_slots_.push_back(slot);
  }

  // Adds a request: samples `ids` of one prompt, with at most `max_new_tokens` each.
  void submit(const std::vector<int64_t>& ids, const int32_t* prompt, int64_t prompt_length, int64_t max_new_tokens) {
    require(!ids.empty(), "a request needs at least one sequence id");
    for (size_t i = 0; i < ids.size(); ++i) {
      const bool repeated = std::find(ids.begin(), ids.begin() + i, ids[i]) != ids.begin() + i;
      require(!repeated && index_of_id_.count(ids[i]) == 0, "sequence ", ids[i], " exists already");
    }
    require(prompt_length >= 1, "sequence ", ids[0], ": the prompt is empty, so nothing predicts its first token");
    require(max_new_tokens >= 1, "sequence ", ids[0], ": max_new_tokens must be at least 1, got ", max_new_tokens);
    check_size(ids[0], prompt_length, prompt_length + max_new_tokens);
    const int32_t leader = static_cast<int32_t>(new_index());
    for (size_t sample = 0; sample < ids.size(); ++sample) {
      const int32_t index = sample == 0 ? leader : static_cast<int32_t>(new_index());
      Sequence& sequence = *sequences_[index];
      sequence = Sequence{};
      sequence.id = ids[sample];
      sequence.generation = ++last_generation_;
      sequence.arrival = ++last_arrival_;
      sequence.tokens.assign(prompt, prompt + prompt_length);
      sequence.prompt_length = sequence.length = static_cast<int32_t>(prompt_length);
      sequence.max_length = static_cast<int32_t>(prompt_length + max_new_tokens);
      index_of_id_[sequence.id] = index;
      if (sample == 0) {
        wait(index);
      } else {
        sequence.state = State::kFollowing;
        sequences_[leader]->followers.push_back(index);
      }
    }
  }

  // Plans the next step. The arrays are valid until the next call. A plan without rows: nothing can run now.
  const StepPlan& plan() {
    reset_plan();
    const int64_t preemptions = stats_.preemptions;
    // 1. One row for every running sequence that waits for nothing but its next token.
    for (size_t place = 0; place < running_.size(); ++place) {
      const Sequence& sequence = *sequences_[running_[place]];
      const bool decodes = sequence.length - sequence.computed == 1 && sequence.length < sequence.max_length;
      if (decodes && sequence.last_plan != plan_number_) schedule(place, 1);
    }
    plan_.n_decodes = plan_.n_scheduled;
    // 2. Chunks of prompts that have begun.
    for (size_t place = 0; place < running_.size() && room() > 0; ++place) {
      const Sequence& sequence = *sequences_[running_[place]];
      const int32_t rows = sequence.length - sequence.computed;
      if (rows > 1 && sequence.last_plan != plan_number_) schedule(place, std::min(rows, room()));
    }
    // 3. New sequences. None after a preemption: it would take the blocks that others lack.
    while (stats_.preemptions == preemptions && room() > 0 && !waiting_.empty() &&
           admit(std::get<2>(*waiting_.begin()))) {
      const Sequence& sequence = *sequences_[running_.back()];
      schedule(running_.size() - 1, std::min(sequence.length - sequence.computed, room()));
    }
    // An entry that changed twice has its last block in both: the order in which a device writes them is open.
    for (int32_t i = 0; i < plan_.n_updates; ++i) plan_.update_blocks[i] = plan_.block_table[plan_.update_entries[i]];
    if (plan_.n_rows > 0) {
      in_flight_.push_back(std::move(samples_));
      samples_ = std::move(spare_);
      samples_.clear();
    }
    return plan_;
  }

  // Reports the tokens of the oldest planned step, in the order of its samples. Returns how many sequences finished.
  // `finished[i]`: token i ended its sequence. A sequence also ends at its longest length.
  int64_t complete(const int32_t* tokens, const uint8_t* finished, int64_t count) {
    require(!in_flight_.empty(), "no planned step is incomplete");
    std::vector<Sample>& samples = in_flight_.front();
    require(count == static_cast<int64_t>(samples.size()), "the step has ", samples.size(), " samples, got ", count);
    int64_t n_finished = 0;
    for (int64_t i = 0; i < count; ++i) {
      Sequence& sequence = *sequences_[samples[i].index];
      // The sequence was aborted, or an earlier token ended it.
      if (sequence.generation != samples[i].generation) continue;
      sequence.tokens.push_back(tokens[i]);
      if (finished[i] || sequence.known() == sequence.max_length) {
        finish(samples[i].index);
        ++n_finished;
      } else {
        publish(sequence);
        // A preempted sequence waits until its sampled tokens are known.
        if (sequence.state == State::kReturning && sequence.known() == sequence.length) wait(samples[i].index);
      }
    }
    spare_ = std::move(samples);  // the next plan needs no allocation
    in_flight_.pop_front();
    return n_finished;
  }

  // Stops a sequence and frees its blocks; `tokens` still returns what it has. Samples in flight are dropped.
  void abort(int64_t id) {
    const int32_t index = existing(id);
    Sequence& sequence = *sequences_[index];
    require(sequence.state != State::kFinished, "sequence ", id, " is finished");
    if (sequence.state == State::kPaused) return;
    leave(index);
    sequence.generation = ++last_generation_;
    sequence.length = sequence.known();
    sequence.state = State::kPaused;
  }

  // Lets an aborted sequence go on from its last token; what is no longer cached is computed again.
  void resume(int64_t id) {
    const int32_t index = existing(id);
    require(sequences_[index]->state == State::kPaused, "sequence ", id, " is not aborted");
    wait(index);
  }

  // Forgets a finished or aborted sequence.
  void remove(int64_t id) {
    const int32_t index = existing(id);
    require(sequences_[index]->state == State::kFinished || sequences_[index]->state == State::kPaused, "sequence ", id,
            " still runs; abort it first");
    index_of_id_.erase(id);
    sequences_[index]->generation = ++last_generation_;
    sequences_[index]->state = State::kRemoved;
    free_indices_.push_back(index);
  }

  // Forgets all keys and values: the weights have changed. Running sequences are computed again.
  void forget_cache() {
    require(in_flight_.empty(), "a planned step is incomplete; complete it before the weights change");
    while (!running_.empty()) preempt(running_.size() - 1);
    pool_.forget_contents();
  }

  // Tokens of a sequence that are known: its prompt, then the reported ones.
  const std::vector<int32_t>& tokens(int64_t id) const { return sequences_[existing(id)]->tokens; }
  bool is_finished(int64_t id) const { return sequences_[existing(id)]->state == State::kFinished; }
  int64_t n_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t n_waiting() const { return static_cast<int64_t>(waiting_.size()) + n_returning_; }
  int64_t n_in_flight() const { return static_cast<int64_t>(in_flight_.size()); }
  int32_t max_blocks() const { return max_blocks_; }
  const std::vector<int32_t>& block_table() const { return plan_.block_table; }
  const SchedulerLimits& limits() const { return limits_; }
  const BlockPool& pool() const { return pool_; }
  const SchedulerStats& stats() const { return stats_; }

  // Throws std::logic_error if blocks, tables and queues contradict each other. For tests: linear in the cache.
  void check_invariants() const;

 private:
  using State = SequenceState;

  struct Sample {
    int32_t index;
    uint64_t generation;
  };

  using Ticket = std::tuple<int64_t, uint64_t, int32_t>;  // (priority, arrival, index); the smallest comes first

  static int32_t log2(int32_t power_of_two) {
    int32_t shift = 0;
    while ((1 << shift) < power_of_two) ++shift;
    return shift;
  }

  // Blocks of a position, and of a number of tokens: shifts, because four divisions per row would take half of a step.
  int32_t block_of(int32_t position) const { return position >> shift_; }
  int32_t offset_of(int32_t position) const { return position & (limits_.block_size - 1); }
  int32_t blocks_for(int64_t tokens) const {
    return static_cast<int32_t>((tokens + limits_.block_size - 1) >> shift_);
  }

  void check_size(int64_t id, int64_t prompt_length, int64_t max_length) const {
    require(max_length <= limits_.max_length, "sequence ", id, ": ", prompt_length, " prompt tokens and ",
            max_length - prompt_length, " new ones exceed max_length, ", limits_.max_length);
    // The last sampled token is never an input.
    require(blocks_for(max_length - 1) <= limits_.n_blocks, "sequence ", id, ": ", max_length - 1,
            " cached tokens need ", blocks_for(max_length - 1), " blocks of ", limits_.block_size, ", and the cache has ", limits_.n_blocks,
            "; give the cache more memory, or shorten the request");
  }

  int32_t existing(int64_t id) const {
    const auto entry = index_of_id_.find(id);
    require(entry != index_of_id_.end(), "there is no sequence ", id);
    return entry->second;
  }

  size_t new_index() {
    if (free_indices_.empty()) {
      sequences_.push_back(std::make_unique<Sequence>());
      return sequences_.size() - 1;
    }
    const int32_t index = free_indices_.back();
    free_indices_.pop_back();
    return index;
  }

  int32_t room() const { return limits_.token_budget - plan_.n_rows; }
  int32_t* table(int32_t slot) { return plan_.block_table.data() + static_cast<size_t>(slot) * max_blocks_; }

  void reset_plan() {
    plan_.n_rows = plan_.n_scheduled = plan_.n_decodes = plan_.n_samples = plan_.n_copies = plan_.n_updates = 0;
    plan_.update_entries.clear();
    plan_.update_blocks.clear();
    plan_.row_starts[0] = 0;
    ++plan_number_;
  }

  // -- queues ---------------------------------------------------------------------------------------------------------

  Ticket ticket(int32_t index) const {
    const Sequence& sequence = *sequences_[index];
    const bool longest = limits_.order == Order::kLongestRemaining;
    return {longest ? sequence.known() - sequence.max_length : 0, sequence.arrival, index};
  }

  void wait(int32_t index) {
    if (sequences_[index]->state == State::kReturning) --n_returning_;
    sequences_[index]->state = State::kWaiting;
    waiting_.insert(ticket(index));
  }

  // Moves a waiting sequence to the end of the running ones, with the cached blocks of its first tokens. Returns false
  // if no row of the block table is free, or the blocks of its tokens are not.
  bool admit(int32_t index) {
    Sequence& sequence = *sequences_[index];
    if (free_slots_.empty()) return false;
    // 1. Look up full blocks. One token stays: its hidden state predicts the next.
    reused_.clear();
    uint64_t content = BlockPool::kNoContent;
    const int32_t full_blocks = limits_.reuse_prefixes ? block_of(sequence.length - 1) : 0;
    while (static_cast<int32_t>(reused_.size()) < full_blocks) {
      const int32_t* tokens = sequence.tokens.data() + reused_.size() * limits_.block_size;
      const int32_t block = pool_.find(content, tokens);
      if (block < 0) break;
      content = pool_.content(block);
      reused_.push_back(block);
    }
    // 2. All its tokens must fit now: a sequence that begins without room would be preempted soon.
    int32_t unreferenced = 0;
    for (const int32_t block : reused_) unreferenced += pool_.references(block) == 0;
    const int32_t missing = blocks_for(sequence.length) - static_cast<int32_t>(reused_.size());
    if (missing + unreferenced > pool_.available()) return false;
    // 3. Take a row of the block table, and the blocks.
    waiting_.erase(ticket(index));
    start(index);
    for (const int32_t block : reused_) {
      pool_.retain(block);
      set_block(sequence, sequence.n_blocks++, block);
    }
    sequence.published = sequence.n_blocks;
    sequence.content = content;
    sequence.computed = sequence.n_blocks * limits_.block_size;
    stats_.reused_tokens += sequence.computed;
    return true;
  }

  void start(int32_t index) {
    Sequence& sequence = *sequences_[index];
    sequence.state = State::kRunning;
    sequence.slot = free_slots_.back();
    free_slots_.pop_back();
    running_.push_back(index);
  }

  void release_blocks(Sequence& sequence) {
    // The last block first: the eviction of a block makes those after it useless.
    for (int32_t i = sequence.n_blocks - 1; i >= 0; --i) pool_.release(table(sequence.slot)[i]);
    free_slots_.push_back(sequence.slot);
    sequence.slot = -1;
    sequence.n_blocks = sequence.published = sequence.computed = 0;
    sequence.content = BlockPool::kNoContent;
  }

  // Takes the blocks of a running sequence; it waits and is computed again.
  void preempt(size_t place) {
    const int32_t index = running_[place];
    Sequence& sequence = *sequences_[index];
    running_.erase(running_.begin() + place);
    release_blocks(sequence);
    ++stats_.preemptions;
    if (sequence.known() == sequence.length) {
      wait(index);
    } else {
      sequence.state = State::kReturning;
      ++n_returning_;
    }
  }

  // Removes a sequence from its queue. The first follower computes the prompt in its place.
  void leave(int32_t index) {
    Sequence& sequence = *sequences_[index];
    if (sequence.state == State::kRunning) {
      running_.erase(std::find(running_.begin(), running_.end(), index));
      release_blocks(sequence);
    } else if (sequence.state == State::kWaiting) {
      waiting_.erase(ticket(index));
    } else if (sequence.state == State::kReturning) {
      --n_returning_;
    } else if (sequence.state == State::kFollowing) {
      for (const auto& other : sequences_) {
        auto& followers = other->followers;
        followers.erase(std::remove(followers.begin(), followers.end(), index), followers.end());
      }
    }
    if (sequence.followers.empty()) return;
    const std::vector<int32_t> followers = std::move(sequence.followers);
    sequence.followers.clear();
    sequences_[followers[0]]->followers.assign(followers.begin() + 1, followers.end());
    wait(followers[0]);
  }

  void finish(int32_t index) {
    leave(index);
    sequences_[index]->generation = ++last_generation_;
    sequences_[index]->length = sequences_[index]->known();
    sequences_[index]->state = State::kFinished;
  }

  // -- rows: scheduler_rows.hpp ---------------------------------------------------------------------------------------

  void set_block(const Sequence& sequence, int32_t column, int32_t block);
  int32_t allocate_for(size_t place);
  bool reserve(size_t place, int32_t rows);
  void schedule(size_t place, int32_t rows);
  void count_rows(const Sequence& sequence, int32_t rows);
  void sample(int32_t index);
  void fork(Sequence& leader);
  void publish(Sequence& sequence);

  SchedulerLimits limits_;
  int32_t shift_;
  BlockPool pool_;
  int32_t max_blocks_;
  StepPlan plan_;
  SchedulerStats stats_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // stable addresses
  std::vector<int32_t> free_indices_, free_slots_, running_, reused_;
  std::set<Ticket> waiting_;
  std::unordered_map<int64_t, int32_t> index_of_id_;
  std::vector<Sample> samples_, spare_;        // of the plan that is being made; storage of a completed one
  std::deque<std::vector<Sample>> in_flight_;  // of planned steps, oldest first
  int64_t n_returning_ = 0;
  uint64_t last_generation_ = 0, last_arrival_ = 0, plan_number_ = 0;
};

}  // namespace icegrt

#include "scheduler_rows.hpp"

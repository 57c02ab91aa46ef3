// The invariants of the block scheduler, for tests.
#pragma once

#include "scheduler.hpp"

namespace icegrt {

inline void BlockScheduler::check_invariants() const {
  const auto expect = [](bool condition, const char* what) {
    if (!condition) throw std::logic_error(what);
  };
  pool_.check_invariants();
  // 1. Every reference of a block is an entry of a running sequence's table.
  std::vector<int32_t> references(pool_.size(), 0);
  std::vector<int8_t> slot_used(limits_.max_sequences, 0);
  for (const int32_t index : running_) {
    const Sequence& sequence = *sequences_[index];
    expect(sequence.state == SequenceState::kRunning && sequence.slot >= 0, "a running sequence has no row");
    expect(!slot_used[sequence.slot]++, "two sequences have one row of the block table");
    expect(sequence.n_blocks >= blocks_for(sequence.computed), "a computed token has no block");
    expect(sequence.computed <= sequence.length, "more tokens are computed than exist");
    const int32_t* blocks = plan_.block_table.data() + static_cast<size_t>(sequence.slot) * max_blocks_;
    for (int32_t i = 0; i < sequence.n_blocks; ++i) ++references[blocks[i]];
  }
  for (const int32_t slot : free_slots_) expect(!slot_used[slot]++, "a row of the block table is free and used");
  for (const int8_t used : slot_used) expect(used == 1, "a row of the block table is lost");
  for (int32_t block = 0; block < pool_.size(); ++block) {
    expect(references[block] == pool_.references(block), "the references of a block are not those of the tables");
  }
  // 2. Every sequence is in exactly the queue of its state.
  int64_t waiting = 0, running = 0, returning = 0, following = 0, followers = 0;
  for (const auto& entry : sequences_) {
    const Sequence& sequence = *entry;
    waiting += sequence.state == SequenceState::kWaiting;
    running += sequence.state == SequenceState::kRunning;
    returning += sequence.state == SequenceState::kReturning;
    following += sequence.state == SequenceState::kFollowing;
    followers += static_cast<int64_t>(sequence.followers.size());
    const bool waits = sequence.state == SequenceState::kWaiting;
    expect(!waits || sequence.known() == sequence.length, "a waiting token is unknown");
  }
  expect(waiting == static_cast<int64_t>(waiting_.size()), "the queue of waiting sequences is wrong");
  expect(running == static_cast<int64_t>(running_.size()), "the queue of running sequences is wrong");
  expect(returning == n_returning_, "the number of returning sequences is wrong");
  expect(following == followers, "a sample follows no sequence");
}

}  // namespace icegrt

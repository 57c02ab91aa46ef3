// How the block scheduler gives rows and blocks to one sequence of a step. Included by scheduler.hpp.
#pragma once

#include "scheduler.hpp"

namespace icegrt {

inline void BlockScheduler::set_block(const Sequence& sequence, int32_t column, int32_t block) {
  table(sequence.slot)[column] = block;
  plan_.update_entries.push_back(sequence.slot * max_blocks_ + column);
  plan_.update_blocks.push_back(block);
  ++plan_.n_updates;
}

// Allocates a block, at the cost of the last running sequence. Returns -1 if that would be the sequence itself. Only
// the last one can be inside its prompt, so those behind `place` are not in the plan yet.
inline int32_t BlockScheduler::allocate_for(size_t place) {
  int32_t block;
  while ((block = pool_.allocate()) < 0) {
    if (place + 1 == running_.size()) return -1;
    preempt(running_.size() - 1);
  }
  return block;
}

// Gives blocks to the next `rows` tokens of a running sequence; false if the cache is full. A last block that others
// share is copied first.
inline bool BlockScheduler::reserve(size_t place, int32_t rows) {
  Sequence& sequence = *sequences_[running_[place]];
  const int32_t tail = block_of(sequence.computed);
  if (offset_of(sequence.computed) != 0 && pool_.references(table(sequence.slot)[tail]) > 1) {
    const int32_t copy = allocate_for(place);
    if (copy < 0) return false;
    const int32_t shared = table(sequence.slot)[tail];
    if (pool_.references(shared) == 1) {  // a preemption has made it the only user
      pool_.release(copy);
    } else {
      plan_.copy_from[plan_.n_copies] = shared;
      plan_.copy_to[plan_.n_copies++] = copy;
      ++stats_.copies;
      pool_.release(shared);
      set_block(sequence, tail, copy);
    }
  }
  const int32_t needed = blocks_for(sequence.computed + rows);
  while (sequence.n_blocks < needed) {
    const int32_t block = allocate_for(place);
    if (block < 0) return false;
    set_block(sequence, sequence.n_blocks++, block);
  }
  return true;
}

// Plans the next `rows` tokens of a running sequence, or preempts it if the cache is full.
inline void BlockScheduler::schedule(size_t place, int32_t rows) {
  const int32_t index = running_[place];
  Sequence& sequence = *sequences_[index];
  if (!reserve(place, rows)) return preempt(place);
  // 1. The rows.
  const int32_t* blocks = table(sequence.slot);
  for (int32_t i = 0; i < rows; ++i, ++plan_.n_rows) {
    const int32_t position = sequence.computed + i;
    plan_.tokens[plan_.n_rows] = position < sequence.known() ? sequence.tokens[position] : kOnDevice;
    plan_.positions[plan_.n_rows] = position;
    plan_.cache_slots[plan_.n_rows] = (blocks[block_of(position)] << shift_) + offset_of(position);
  }
  count_rows(sequence, rows);
  sequence.computed += rows;
  sequence.high_water = std::max(sequence.high_water, sequence.computed);
  sequence.last_plan = plan_number_;
  plan_.lengths[plan_.n_scheduled] = sequence.computed;
  plan_.table_rows[plan_.n_scheduled] = sequence.slot;
  plan_.row_starts[++plan_.n_scheduled] = plan_.n_rows;
  publish(sequence);
  // 2. The last token's row samples the next one, for the other samples of the prompt too.
  if (sequence.computed == sequence.length) {
    sample(index);
    if (!sequence.followers.empty()) fork(sequence);
  }
}

inline void BlockScheduler::count_rows(const Sequence& sequence, int32_t rows) {
  const int32_t again = std::clamp(sequence.high_water - sequence.computed, 0, rows);
  stats_.recomputed_tokens += again;
  if (sequence.length == sequence.prompt_length) stats_.prompt_tokens += rows - again;
}

inline void BlockScheduler::sample(int32_t index) {
  Sequence& sequence = *sequences_[index];
  plan_.sample_rows[plan_.n_samples] = plan_.n_rows - 1;
  plan_.sample_slots[plan_.n_samples] = sequence.slot;
  plan_.sample_positions[plan_.n_samples] = sequence.length;
  plan_.sample_ids[plan_.n_samples++] = sequence.id;
  samples_.push_back({index, sequence.generation});
  ++sequence.length;
}

// Starts the followers of a sequence whose prompt is computed; they share its blocks. Those without a row of the block
// table wait like new sequences, and find the full blocks by their content.
inline void BlockScheduler::fork(Sequence& leader) {
  const std::vector<int32_t> followers = std::move(leader.followers);
  leader.followers.clear();
  for (const int32_t index : followers) {
    if (free_slots_.empty()) {
      wait(index);
      continue;
    }
    Sequence& sequence = *sequences_[index];
    start(index);
    for (int32_t i = 0; i < leader.n_blocks; ++i) {
      const int32_t block = table(leader.slot)[i];
      pool_.retain(block);
      set_block(sequence, i, block);
    }
    sequence.n_blocks = leader.n_blocks;
    sequence.published = leader.published;
    sequence.content = leader.content;
    sequence.last_plan = plan_number_;
    sequence.computed = sequence.high_water = leader.prompt_length;
    stats_.shared_tokens += leader.prompt_length;
    sample(index);
  }
}

// Publishes the full blocks whose tokens are known and whose keys and values are planned.
inline void BlockScheduler::publish(Sequence& sequence) {
  if (!limits_.reuse_prefixes || sequence.slot < 0) return;
  const int32_t full = block_of(std::min(sequence.computed, sequence.known()));
  for (; sequence.published < full; ++sequence.published) {
    const int32_t* tokens = sequence.tokens.data() + static_cast<size_t>(sequence.published) * limits_.block_size;
    sequence.content = pool_.publish(table(sequence.slot)[sequence.published], sequence.content, tokens);
  }
}

}  // namespace icegrt

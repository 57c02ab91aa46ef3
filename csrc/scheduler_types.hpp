// What the block scheduler takes, keeps and returns: limits, sequences, the plan of a step, counts.
#pragma once

#include <cstdint>
#include <vector>

#include "block_pool.hpp"
#include "check.hpp"

namespace icegrt {

enum class Order { kFirstCome, kLongestRemaining };

struct SchedulerLimits {
  int32_t n_blocks;
  int32_t block_size;
  int32_t max_sequences;  // that hold blocks at a time: rows of the block table
  int32_t max_length;     // tokens of a sequence
  int32_t token_budget;   // rows of a step
  Order order = Order::kFirstCome;
  bool reuse_prefixes = true;
};

// A step, in arrays of which the first entries are used. T rows, S scheduled sequences, N samples, C copies, U updates.
struct StepPlan {
  int32_t n_rows = 0, n_scheduled = 0, n_decodes = 0, n_samples = 0, n_copies = 0, n_updates = 0;
  std::vector<int32_t> tokens, positions, cache_slots;              // [T]
  std::vector<int32_t> row_starts, lengths, table_rows;             // [S + 1], [S], [S]
  std::vector<int32_t> sample_rows, sample_slots, sample_positions; // [N]
  std::vector<int64_t> sample_ids;                                  // [N]
  // [C] blocks, copied before the step writes; all are read before any is written.
  std::vector<int32_t> copy_from, copy_to;
  std::vector<int32_t> update_entries, update_blocks;               // [U] changed entries of the block table
  std::vector<int32_t> block_table;                                 // [max_sequences, max_blocks], as updated
};

struct SchedulerStats {
  int64_t prompt_tokens = 0;    // computed for sequences without a sampled token
  int64_t reused_tokens = 0;    // not computed: their blocks were in the cache
  int64_t shared_tokens = 0;    // not computed: another sample of the prompt has them
  int64_t recomputed_tokens = 0;  // computed again after a preemption, an abort or a change of weights
  int64_t preemptions = 0, copies = 0;
};

inline const SchedulerLimits& checked(const SchedulerLimits& limits) {
  require(limits.n_blocks >= 1, "n_blocks must be at least 1, got ", limits.n_blocks);
  const bool power_of_two = limits.block_size >= 1 && (limits.block_size & (limits.block_size - 1)) == 0;
  require(power_of_two, "block_size must be a power of two, got ", limits.block_size);
  require(limits.max_sequences >= 1, "max_sequences must be at least 1, got ", limits.max_sequences);
  require(limits.max_length >= 1, "max_length must be at least 1, got ", limits.max_length);
  require(limits.token_budget >= limits.max_sequences, "token_budget must be at least max_sequences (",
          limits.max_sequences, "), or running sequences would wait in turn; got ", limits.token_budget);
  return limits;
}

// kFollowing: another sample of the request computes the prompt. kReturning: preempted with samples in flight.
enum class SequenceState : uint8_t { kFollowing, kWaiting, kRunning, kReturning, kPaused, kFinished, kRemoved };

struct Sequence {
  // The first 64 bytes are what a decode step reads.
  int64_t id = 0;
  uint64_t generation = 0;
  uint64_t last_plan = 0;          // number of the last plan that it is in
  std::vector<int32_t> tokens;     // known ones
  int32_t slot = -1;               // row of the block table while it runs
  int32_t length = 0;              // tokens, those in flight included
  int32_t computed = 0;            // tokens whose keys and values planned steps have written
  int32_t max_length = 0;
  int32_t prompt_length = 0;
  int32_t high_water = 0;          // the largest `computed` so far: rows below it are computed again
  int32_t n_blocks = 0, published = 0;
  uint64_t content = BlockPool::kNoContent;  // of the last published block
  uint64_t arrival = 0;
  SequenceState state = SequenceState::kWaiting;
  std::vector<int32_t> followers;  // samples that share the prompt once it is computed

  int32_t known() const { return static_cast<int32_t>(tokens.size()); }
};

}  // namespace icegrt

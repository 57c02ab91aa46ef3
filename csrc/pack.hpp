// Pack ragged prompts and responses into a token stream and an action stream.
//
// The token stream holds prompt and response of every sequence, end to end. The action stream has one entry per
// response token. An action's row is the row of the token stream whose hidden state predicts it: the row before the
// action's token. So a prompt needs at least one token, to predict the first action.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.hpp"

namespace icegrt {

struct PackInput {
  Span<int64_t> prompt_tokens, prompt_offsets;
  Span<int64_t> response_tokens, response_offsets;
  bool has_mask = false;
  Span<int64_t> mask_offsets;
  int64_t tail_multiple = 1;
  int64_t tail_token = 0;
};

struct Packed {
  std::vector<int64_t> tokens, positions;  // T
  std::vector<int32_t> cu_seqlens;         // N + 1, or N + 2 with a tail
  std::vector<int32_t> cu_actions;         // N + 1
  std::vector<int64_t> action_rows;        // A
  std::vector<int64_t> last_rows;          // N
  int64_t max_seqlen = 0;
  int64_t tail_tokens = 0;
};

inline void check_tokens(const char* name, Span<int64_t> tokens, Span<int64_t> offsets) {
  for (int64_t i = 0; i < tokens.size; ++i) {
    if (tokens[i] >= 0) continue;
    const int64_t* end = offsets.data + offsets.size;
    const int64_t row = std::upper_bound(offsets.data, end, i) - offsets.data - 1;
    require(false, name, "[", row, "][", i - offsets[row], "]: token ids must be >= 0, got ", tokens[i]);
  }
}

inline void check_pack(const PackInput& in) {
  check_offsets("prompts", in.prompt_offsets, in.prompt_tokens.size);
  check_offsets("responses", in.response_offsets, in.response_tokens.size);
  const int64_t n = in.prompt_offsets.size - 1;
  require(in.response_offsets.size - 1 == n, "responses: expected one per prompt (", n, "), got ",
          in.response_offsets.size - 1);
  require(in.tail_multiple >= 1, "tail_multiple: expected >= 1, got ", in.tail_multiple);
  require(in.tail_token >= 0, "tail_token: token ids must be >= 0, got ", in.tail_token);
  if (in.has_mask) {
    require(in.mask_offsets.size - 1 == n, "action_masks: expected one per response (", n, "), got ",
            in.mask_offsets.size - 1);
  }
  for (int64_t i = 0; i < n; ++i) {
    require(in.prompt_offsets[i + 1] > in.prompt_offsets[i], "prompts[", i,
            "] is empty: a sequence needs at least one prompt token to predict its first action");
    if (!in.has_mask) continue;
    const int64_t actions = in.response_offsets[i + 1] - in.response_offsets[i];
    const int64_t masked = in.mask_offsets[i + 1] - in.mask_offsets[i];
    require(masked == actions, "action_masks[", i, "]: expected ", actions, " entries, as responses[", i, "] has, got ",
            masked);
  }
  check_tokens("prompts", in.prompt_tokens, in.prompt_offsets);
  check_tokens("responses", in.response_tokens, in.response_offsets);
}

inline Packed pack(const PackInput& in) {
  check_pack(in);
  const int64_t n = in.prompt_offsets.size - 1;
  const int64_t n_real = checked_add(in.prompt_tokens.size, in.response_tokens.size, "prompts and responses");
  // 1. Sizes. Megatron 0.16 fails on T = 0 and, with sequence parallelism, on a T that is no multiple of the
  //    tensor-parallel size: the tail pads such a batch.
  const int64_t n_min = std::max<int64_t>(n_real, 1);
  const int64_t remainder = n_min % in.tail_multiple;
  const int64_t n_total = checked_add(n_min, remainder ? in.tail_multiple - remainder : 0, "tail_multiple");
  require(n_total <= std::numeric_limits<int32_t>::max(), "prompts and responses: ", n_total,
          " tokens in one batch do not fit cu_seqlens (int32)");

  Packed out;
  out.tail_tokens = n_total - n_real;
  out.tokens.resize(n_total);
  out.positions.resize(n_total);
  out.cu_seqlens.resize(n + 1 + (out.tail_tokens > 0));
  out.cu_actions.resize(n + 1);
  out.action_rows.resize(in.response_tokens.size);
  out.last_rows.resize(n);

  // 2. Sequences.
  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t start = row;
    const int64_t* prompt = in.prompt_tokens.data + in.prompt_offsets[i];
    const int64_t n_prompt = in.prompt_offsets[i + 1] - in.prompt_offsets[i];
    const int64_t* response = in.response_tokens.data + in.response_offsets[i];
    const int64_t n_actions = in.response_offsets[i + 1] - in.response_offsets[i];
    std::copy_n(prompt, n_prompt, out.tokens.data() + row);
    row += n_prompt;
    std::copy_n(response, n_actions, out.tokens.data() + row);
    int64_t* rows = out.action_rows.data() + in.response_offsets[i];
    for (int64_t k = 0; k < n_actions; ++k) rows[k] = row + k - 1;
    row += n_actions;
    for (int64_t k = start; k < row; ++k) out.positions[k] = k - start;
    out.cu_seqlens[i + 1] = static_cast<int32_t>(row);
    out.cu_actions[i + 1] = static_cast<int32_t>(in.response_offsets[i + 1]);
    out.last_rows[i] = row - 1;
    out.max_seqlen = std::max(out.max_seqlen, row - start);
  }
  // 3. Tail.
  if (out.tail_tokens > 0) {
    for (int64_t k = 0; k < out.tail_tokens; ++k) {
      out.tokens[row + k] = in.tail_token;
      out.positions[row + k] = k;
    }
    out.cu_seqlens[n + 1] = static_cast<int32_t>(n_total);
    out.max_seqlen = std::max(out.max_seqlen, out.tail_tokens);
  }
  return out;
}

}  // namespace icegrt

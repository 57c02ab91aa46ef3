// Pack ragged prompts and responses into a token stream and an action stream.
//
// The token stream holds prompt and response of every sequence, end to end. The action stream has one entry per
// response token. An action's row is the row of the token stream whose hidden state predicts it: the row before the
// action's token. So a prompt needs at least one token, to predict the first action.
//
// Prompts that several sequences share are in the stream once. Segments of such a stream, in order:
//
//   shared prompts | the responses to each of them, by prompt | whole sequences | tail
//
// A response's positions continue its prompt's, and the first action of every response has the prompt's last row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string_view>
#include <unordered_map>
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
  bool share_prompts = false;
};

struct Packed {
  std::vector<int64_t> tokens, positions;  // T
  std::vector<int32_t> cu_seqlens;         // S + 1: offsets of the segments, which are the N sequences if none is shared
  std::vector<int32_t> cu_actions;         // N + 1
  std::vector<int64_t> action_rows;        // A
  std::vector<int64_t> last_rows;          // N
  std::vector<int64_t> groups;             // N: the shared prompt of a sequence, -1 for a whole one; empty: none shared
  std::vector<int32_t> cu_groups;          // G + 1: offsets of each shared prompt's responses, from the first response
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

// The sequences of each prompt that several sequences have, in the order of its first sequence.
inline std::vector<std::vector<int64_t>> sequences_by_shared_prompt(const PackInput& in) {
  std::unordered_map<std::string_view, int64_t> number_of;  // contents are compared, not only their hashes
  std::vector<std::vector<int64_t>> sequences;
  for (int64_t i = 0; i < in.prompt_offsets.size - 1; ++i) {
    const auto* begin = reinterpret_cast<const char*>(in.prompt_tokens.data + in.prompt_offsets[i]);
    const auto* end = reinterpret_cast<const char*>(in.prompt_tokens.data + in.prompt_offsets[i + 1]);
    const auto [found, is_new] = number_of.try_emplace({begin, static_cast<std::size_t>(end - begin)}, sequences.size());
    if (is_new) sequences.emplace_back();
    sequences[found->second].push_back(i);
  }
  sequences.erase(std::remove_if(sequences.begin(), sequences.end(), [](const auto& s) { return s.size() < 2; }),
                  sequences.end());
  return sequences;
}

// Writes segments of the token stream, one after the other.
class StreamWriter {
 public:
  StreamWriter(Packed& out, int64_t n_tokens) : out_(out) {
    out.tokens.reserve(n_tokens);
    out.positions.reserve(n_tokens);
    out.cu_seqlens.push_back(0);
  }

  int64_t row() const { return static_cast<int64_t>(out_.tokens.size()); }

  // Appends entries [begin, end) of `tokens` to the open segment, at positions from `position` on.
  void append(Span<int64_t> tokens, int64_t begin, int64_t end, int64_t position) {
    out_.tokens.insert(out_.tokens.end(), tokens.data + begin, tokens.data + end);
    append_positions(end - begin, position);
  }

  void append_tail(int64_t token, int64_t count) {
    out_.tokens.insert(out_.tokens.end(), count, token);
    append_positions(count, 0);
  }

  void end_segment() {
    out_.max_seqlen = std::max<int64_t>(out_.max_seqlen, row() - out_.cu_seqlens.back());
    out_.cu_seqlens.push_back(static_cast<int32_t>(row()));
  }

 private:
  void append_positions(int64_t count, int64_t first) {
    out_.positions.resize(out_.positions.size() + count);
    std::iota(out_.positions.end() - count, out_.positions.end(), first);
  }

  Packed& out_;
};

inline Packed pack(const PackInput& in) {
  check_pack(in);
  const int64_t n = in.prompt_offsets.size - 1;
  const auto prompt_length = [&](int64_t i) { return in.prompt_offsets[i + 1] - in.prompt_offsets[i]; };
  const auto shared = in.share_prompts ? sequences_by_shared_prompt(in) : std::vector<std::vector<int64_t>>();
  // 1. Sizes. Megatron 0.16 fails on T = 0 and, with sequence parallelism, on a T that is no multiple of the
  //    tensor-parallel size: the tail pads such a batch.
  int64_t n_real = checked_add(in.prompt_tokens.size, in.response_tokens.size, "prompts and responses");
  for (const auto& sequences : shared) {
    n_real -= (static_cast<int64_t>(sequences.size()) - 1) * prompt_length(sequences.front());
  }
  const int64_t n_min = std::max<int64_t>(n_real, 1);
  const int64_t remainder = n_min % in.tail_multiple;
  const int64_t n_total = checked_add(n_min, remainder ? in.tail_multiple - remainder : 0, "tail_multiple");
  require(n_total <= std::numeric_limits<int32_t>::max(), "prompts and responses: ", n_total,
          " tokens in one batch do not fit cu_seqlens (int32)");

  Packed out;
  out.tail_tokens = n_total - n_real;
  out.cu_actions.assign(in.response_offsets.data, in.response_offsets.data + in.response_offsets.size);
  out.action_rows.resize(in.response_tokens.size);
  out.last_rows.resize(n);
  if (!shared.empty()) out.groups.assign(n, -1);
  StreamWriter stream(out, n_total);
  // The response follows in the stream; `before` is the row of the prompt's last token.
  const auto append_response = [&](int64_t i, int64_t before) {
    const int64_t begin = in.response_offsets[i], end = in.response_offsets[i + 1];
    for (int64_t k = begin; k < end; ++k) out.action_rows[k] = k == begin ? before : stream.row() + k - begin - 1;
    stream.append(in.response_tokens, begin, end, prompt_length(i));
    out.last_rows[i] = end > begin ? stream.row() - 1 : before;
    stream.end_segment();
  };

  // 2. Shared prompts.
  std::vector<int64_t> last_prompt_row;
  for (const auto& sequences : shared) {
    const int64_t i = sequences.front();
    stream.append(in.prompt_tokens, in.prompt_offsets[i], in.prompt_offsets[i + 1], 0);
    stream.end_segment();
    last_prompt_row.push_back(stream.row() - 1);
  }
  // 3. The responses to them.
  const int64_t first_response_row = stream.row();
  if (!shared.empty()) out.cu_groups.push_back(0);
  for (std::size_t g = 0; g < shared.size(); ++g) {
    for (int64_t i : shared[g]) {
      out.groups[i] = static_cast<int64_t>(g);
      append_response(i, last_prompt_row[g]);
    }
    out.cu_groups.push_back(static_cast<int32_t>(stream.row() - first_response_row));
  }
  // 4. Whole sequences.
  for (int64_t i = 0; i < n; ++i) {
    if (!out.groups.empty() && out.groups[i] >= 0) continue;
    stream.append(in.prompt_tokens, in.prompt_offsets[i], in.prompt_offsets[i + 1], 0);
    append_response(i, stream.row() - 1);
  }
  // 5. Tail.
  if (out.tail_tokens > 0) {
    stream.append_tail(in.tail_token, out.tail_tokens);
    stream.end_segment();
  }
  return out;
}

}  // namespace icegrt

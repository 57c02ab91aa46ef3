// Blocks of a paged KV cache: reference counts, reuse by content, eviction of the least recently used.
//
// A block holds the keys and values of `block_size` tokens. It is in one of three states: referenced by at least one
// sequence; unreferenced with content that a later prompt may reuse; or free. The pool keeps numbers only, no tensors.
//
// A full block can be published under the tokens in it and the content before it. Two blocks have the same content id
// only if all tokens up to their end are equal, which is compared, not hashed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "check.hpp"

namespace icegrt {

class BlockPool {
 public:
  // The content before the first block of a sequence.
  static constexpr uint64_t kNoContent = 0;

  BlockPool(int32_t n_blocks, int32_t block_size)
      : block_size_(block_size), references_(n_blocks, 0), next_(n_blocks + 1), previous_(n_blocks + 1),
        parent_(n_blocks, kNoContent), content_(n_blocks, kNoContent), hash_(n_blocks, 0),
        tokens_(static_cast<size_t>(n_blocks) * block_size), chain_(n_blocks, -1) {
    size_t n_buckets = 16;
    while (n_buckets < 2 * static_cast<size_t>(n_blocks)) n_buckets *= 2;
    buckets_.assign(n_buckets, -1);
    free_.reserve(n_blocks);
    for (int32_t block = n_blocks - 1; block >= 0; --block) free_.push_back(block);
    lru_end_ = n_blocks;  // sentinel of a circular list: its next is the least recently used block
    next_[lru_end_] = previous_[lru_end_] = lru_end_;
  }

  int32_t size() const { return static_cast<int32_t>(references_.size()); }
  int32_t block_size() const { return block_size_; }
  // Blocks that `allocate` can return: free ones, and unreferenced ones whose content would be evicted.
  int32_t available() const { return static_cast<int32_t>(free_.size()) + n_reusable_; }
  // Unreferenced blocks with content.
  int32_t reusable() const { return n_reusable_; }
  int32_t references(int32_t block) const { return references_[block]; }
  uint64_t content(int32_t block) const { return content_[block]; }

  // Returns a block with one reference and no content; -1 if all blocks are referenced.
  int32_t allocate() {
    int32_t block;
    if (!free_.empty()) {
      block = free_.back();
      free_.pop_back();
    } else if (n_reusable_ > 0) {
      block = next_[lru_end_];
      unlink(block);
      withdraw(block);
    } else {
      return -1;
    }
    references_[block] = 1;
    return block;
  }

  // Adds a reference. An unreferenced block with content is in use again.
  void retain(int32_t block) {
    if (references_[block]++ == 0) unlink(block);
  }

  // Drops a reference. A block without references is reusable if it has content, else free.
  void release(int32_t block) {
    if (--references_[block] > 0) return;
    if (content_[block] == kNoContent) {
      free_.push_back(block);
    } else {
      link_last(block);
    }
  }

  // Returns the block with these tokens after the content `parent`; -1 if there is none.
  int32_t find(uint64_t parent, const int32_t* tokens) const { return find(parent, tokens, hash(parent, tokens)); }

  // Publishes a full block. Returns its content id, which is that of an earlier block with equal content.
  uint64_t publish(int32_t block, uint64_t parent, const int32_t* tokens) {
    const uint64_t key = hash(parent, tokens);
    const int32_t equal = find(parent, tokens, key);
    if (equal >= 0) return content_[equal];
    parent_[block] = parent;
    content_[block] = ++last_content_;
    hash_[block] = key;
    std::copy(tokens, tokens + block_size_, tokens_of(block));
    chain_[block] = bucket(key);
    bucket(key) = block;
    return content_[block];
  }

  // Forgets every content: keys and values of other weights must not be reused. References stay.
  void forget_contents() {
    while (n_reusable_ > 0) {
      const int32_t block = next_[lru_end_];
      unlink(block);
      free_.push_back(block);
    }
    std::fill(buckets_.begin(), buckets_.end(), -1);
    std::fill(content_.begin(), content_.end(), kNoContent);
  }

  // Throws std::logic_error if the states of the blocks contradict each other. For tests: linear in the blocks.
  void check_invariants() const {
    const auto expect = [](bool condition, const char* what) {
      if (!condition) throw std::logic_error(what);
    };
    std::vector<int8_t> seen(references_.size(), 0);
    for (const int32_t block : free_) {
      expect(references_[block] == 0, "a free block is referenced");
      expect(content_[block] == kNoContent, "a free block has content");
      expect(!seen[block]++, "a block is free twice");
    }
    int32_t reusable = 0;
    for (int32_t block = next_[lru_end_]; block != lru_end_; block = next_[block], ++reusable) {
      expect(references_[block] == 0, "a reusable block is referenced");
      expect(content_[block] != kNoContent, "a reusable block has no content");
      expect(previous_[next_[block]] == block, "the list of reusable blocks is broken");
      expect(!seen[block]++, "a block is both free and reusable");
    }
    expect(reusable == n_reusable_, "the number of reusable blocks is wrong");
    size_t with_content = 0;
    for (int32_t block = 0; block < size(); ++block) {
      expect(references_[block] >= 0, "a block was released too often");
      expect((references_[block] > 0) != (seen[block] > 0), "a block is lost");
      with_content += content_[block] != kNoContent;
    }
    for (const int32_t head : buckets_) {
      for (int32_t block = head; block >= 0; block = chain_[block], --with_content) {
        expect(content_[block] != kNoContent, "the index has a block without content");
        expect(hash_[block] == hash(parent_[block], tokens_of(block)), "the index has a wrong hash");
        expect(with_content > 0, "the index has more blocks than contents");
      }
    }
    expect(with_content == 0, "the index lacks a content");
  }

 private:
  int32_t* tokens_of(int32_t block) { return tokens_.data() + static_cast<size_t>(block) * block_size_; }
  const int32_t* tokens_of(int32_t block) const { return tokens_.data() + static_cast<size_t>(block) * block_size_; }

  int32_t& bucket(uint64_t key) { return buckets_[key & (buckets_.size() - 1)]; }

  int32_t find(uint64_t parent, const int32_t* tokens, uint64_t key) const {
    int32_t block = buckets_[key & (buckets_.size() - 1)];
    for (; block >= 0; block = chain_[block]) {
      const bool candidate = hash_[block] == key && parent_[block] == parent;
      if (candidate && std::equal(tokens, tokens + block_size_, tokens_of(block))) break;
    }
    return block;
  }

  // Multiply and rotate by token. It only distributes: contents are compared.
  uint64_t hash(uint64_t parent, const int32_t* tokens) const {
    uint64_t state = parent * 0x9E3779B97F4A7C15ull + 1;
    for (int32_t i = 0; i < block_size_; ++i) {
      state = (state ^ static_cast<uint32_t>(tokens[i])) * 0xD6E8FEB86659FD93ull;
      state ^= state >> 29;
    }
    return state;
  }

  void withdraw(int32_t block) {
    int32_t* link = &bucket(hash_[block]);
    while (*link != block) link = &chain_[*link];
    *link = chain_[block];
    content_[block] = kNoContent;
  }

  void link_last(int32_t block) {
    const int32_t last = previous_[lru_end_];
    next_[last] = previous_[lru_end_] = block;
    previous_[block] = last;
    next_[block] = lru_end_;
    ++n_reusable_;
  }

  void unlink(int32_t block) {
    next_[previous_[block]] = next_[block];
    previous_[next_[block]] = previous_[block];
    --n_reusable_;
  }

  int32_t block_size_;
  std::vector<int32_t> references_;
  std::vector<int32_t> free_;
  std::vector<int32_t> next_, previous_;  // the reusable blocks, least recently used first
  int32_t lru_end_ = 0, n_reusable_ = 0;
  std::vector<uint64_t> parent_, content_, hash_;  // by block; content 0: not published
  std::vector<int32_t> tokens_;                    // by published block
  std::vector<int32_t> buckets_, chain_;           // hash table of published blocks: first of a bucket, next by block
  uint64_t last_content_ = kNoContent;
};

}  // namespace icegrt

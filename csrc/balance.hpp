// Sequences -> micro-batches under a token budget, the same number of them on every data-parallel rank.
//
// 1. How many: between a lower bound and what best-fit-decreasing needs, the smallest number that longest-first placement
//    followed by `refine` fits under the budget (binary search).
// 2. How even: the largest bin trades one sequence with a smaller bin until no trade lowers it (`refine`).
// 3. Where: bins are dealt to the ranks by size, so micro-batch m has a similar size on every rank.
// Ties break on the index everywhere and effort is counted, not timed: one input gives one plan on every machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "check.hpp"
#include "refine.hpp"

namespace icegrt {

struct Plan {
  int64_t n_micro_batches = 0;       // per rank
  std::vector<int64_t> order;        // sequence indices, grouped by (rank, micro-batch), ascending inside a group
  std::vector<int64_t> offsets;      // ranks * n_micro_batches + 1
  std::vector<int64_t> bin_tokens;   // ranks * n_micro_batches
};

inline std::vector<int64_t> descending(Span<int64_t> keys) {
  std::vector<int64_t> order(keys.size);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  return order;
}

// No packing can use fewer bins: the total must fit, and at most k sequences longer than budget / (k + 1) share a bin.
inline int64_t bins_lower_bound(Span<int64_t> lengths, const std::vector<int64_t>& order, int64_t total, int64_t budget) {
  int64_t bound = total / budget + (total % budget != 0);
  for (int64_t k = 1; k <= 8; ++k) {
    const auto end = std::partition_point(order.begin(), order.end(),
                                          [&](int64_t i) { return lengths[i] > budget / (k + 1); });
    const int64_t count = end - order.begin();
    bound = std::max(bound, (count + k - 1) / k);
  }
  return bound;
}

inline std::vector<Bin> best_fit_decreasing(const Items& items, const std::vector<int64_t>& order, int64_t budget) {
  std::vector<Bin> bins;
  std::set<std::pair<int64_t, int64_t>> room;  // (tokens left, bin)
  for (int64_t i : order) {
    auto it = room.lower_bound({items.lengths[i], -1});
    int64_t b;
    int64_t left;
    if (it == room.end()) {
      b = static_cast<int64_t>(bins.size());
      left = budget;
      bins.emplace_back();
    } else {
      left = it->first;
      b = it->second;
      room.erase(it);
    }
    bins[b].add(i, items);
    room.insert({left - items.lengths[i], b});
  }
  return bins;
}

// Longest first, each into the lightest bin. The budget is not looked at: `refine` or the caller sees to it.
inline std::vector<Bin> longest_first(const Items& items, const std::vector<int64_t>& order, int64_t n_bins) {
  std::vector<Bin> bins(n_bins);
  using Entry = std::pair<int64_t, int64_t>;  // (cost, bin)
  std::vector<Entry> heap(n_bins);
  for (int64_t b = 0; b < n_bins; ++b) heap[b] = {0, b};
  const auto later = std::greater<Entry>();
  for (int64_t i : order) {
    std::pop_heap(heap.begin(), heap.end(), later);
    Entry& lightest = heap.back();
    bins[lightest.second].add(i, items);
    lightest.first += items.costs[i];
    std::push_heap(heap.begin(), heap.end(), later);
  }
  return bins;
}

inline bool within(const std::vector<Bin>& bins, int64_t budget) {
  return std::all_of(bins.begin(), bins.end(), [&](const Bin& bin) { return bin.tokens <= budget; });
}

// Deals the bins to the ranks in rounds, heaviest bin of a round to the rank with the least so far.
inline Plan deal(std::vector<Bin>& bins, int64_t ranks, int64_t n_sequences) {
  const int64_t rounds = static_cast<int64_t>(bins.size()) / ranks;
  std::vector<int64_t> by_cost(bins.size());
  std::iota(by_cost.begin(), by_cost.end(), int64_t{0});
  std::stable_sort(by_cost.begin(), by_cost.end(), [&](int64_t a, int64_t b) { return bins[a].cost > bins[b].cost; });

  std::vector<int64_t> slot(bins.size());  // slot[rank * rounds + round] = bin
  std::vector<int64_t> load(ranks, 0), lightest(ranks);
  std::iota(lightest.begin(), lightest.end(), int64_t{0});
  for (int64_t round = 0; round < rounds; ++round) {
    std::sort(lightest.begin(), lightest.end(),
              [&](int64_t a, int64_t b) { return std::make_pair(load[a], a) < std::make_pair(load[b], b); });
    for (int64_t k = 0; k < ranks; ++k) {
      const int64_t bin = by_cost[round * ranks + k];
      slot[lightest[k] * rounds + round] = bin;
      load[lightest[k]] += bins[bin].cost;
    }
  }

  Plan plan;
  plan.n_micro_batches = rounds;
  plan.order.reserve(n_sequences);
  plan.offsets.push_back(0);
  for (int64_t bin : slot) {
    std::vector<int64_t>& members = bins[bin].items;
    std::sort(members.begin(), members.end());
    plan.order.insert(plan.order.end(), members.begin(), members.end());
    plan.offsets.push_back(static_cast<int64_t>(plan.order.size()));
    plan.bin_tokens.push_back(bins[bin].tokens);
  }
  return plan;
}

inline void check_balance(const Items& items, int64_t budget, int64_t ranks, int64_t round_to, int64_t* total) {
  require(budget >= 1, "token_budget: expected >= 1, got ", budget);
  require(ranks >= 1, "ranks: expected >= 1, got ", ranks);
  require(round_to >= 1, "round_to: expected >= 1, got ", round_to);
  int64_t smallest_plan;
  require(!__builtin_mul_overflow(ranks, round_to, &smallest_plan) && smallest_plan <= kMaxBins,
          "ranks * round_to: ", ranks, " * ", round_to, " micro-batches are more than ", kMaxBins);
  require(items.costs.size == items.lengths.size, "costs: expected one per sequence (", items.lengths.size, "), got ",
          items.costs.size);
  int64_t cost = 0;
  for (int64_t i = 0; i < items.lengths.size; ++i) {
    const int64_t length = items.lengths[i];
    require(length >= 1, "lengths[", i, "]: expected >= 1 tokens, got ", length);
    require(length <= budget, "lengths[", i, "]: a sequence of ", length, " tokens is longer than token_budget ", budget);
    require(items.costs[i] >= 0, "costs[", i, "]: expected >= 0, got ", items.costs[i]);
    *total = checked_add(*total, length, "lengths");
    cost = checked_add(cost, items.costs[i], "costs");
  }
}

inline Plan balance(Span<int64_t> lengths, Span<int64_t> costs, int64_t budget, int64_t ranks, int64_t round_to) {
  const Items by_cost{lengths, costs};
  const Items by_length{lengths, lengths};
  int64_t total = 0;
  check_balance(by_cost, budget, ranks, round_to, &total);

  const std::vector<int64_t> order = descending(lengths);
  const auto rounded = [&](int64_t n_bins) {  // micro-batches per rank, in units of round_to
    const int64_t unit = ranks * round_to;
    return std::max<int64_t>(1, n_bins / unit + (n_bins % unit != 0));
  };
  const std::vector<Bin> fallback = best_fit_decreasing(by_length, order, budget);
  int64_t low = rounded(bins_lower_bound(lengths, order, total, budget));
  int64_t high = rounded(static_cast<int64_t>(fallback.size()));
  const auto n_bins = [&](int64_t units) { return units * ranks * round_to; };
  require(n_bins(high) <= kMaxBins, "token_budget: ", budget, " asks for ", n_bins(high),
          " micro-batches, more than ", kMaxBins);

  std::vector<Bin> bins;
  const auto attempt = [&](int64_t units) {
    std::vector<Bin> trial = longest_first(by_length, order, n_bins(units));
    refine(trial, by_length);
    if (!within(trial, budget)) return false;
    bins = std::move(trial);
    return true;
  };
  int64_t accepted = -1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (attempt(middle)) {
      accepted = high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (accepted != high && !attempt(high)) {  // too tight for the even placement: start from the packing that fits
    bins = fallback;
    bins.resize(n_bins(high));
    for (Bin& bin : bins) bin.sort(by_length);
    refine(bins, by_length, budget);
  }
  if (costs.data != lengths.data) {
    std::vector<Bin> trial = longest_first(by_cost, descending(costs), static_cast<int64_t>(bins.size()));
    if (!within(trial, budget)) trial = std::move(bins);
    for (Bin& bin : trial) bin.recount(by_cost);
    refine(trial, by_cost, budget);
    bins = std::move(trial);
  }
  return deal(bins, ranks, lengths.size);
}

}  // namespace icegrt

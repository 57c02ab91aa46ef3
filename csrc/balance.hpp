// Assign sequences to micro-batches under a token budget, with the same number of micro-batches on every data-parallel
// rank. A bin is a micro-batch before it has a rank.
//
// 1. Number: binary search between a lower bound and the bins of best-fit-decreasing, for the smallest number that
//    longest-first placement followed by `refine` fits under the budget.
// 2. Balance: the largest bin exchanges sequences with smaller bins until no exchange lowers it (`refine`).
// 3. Ranks: bins go to the ranks by size, so that micro-batch m has a similar size on every rank.
// Ties are broken by the index and the effort is counted, not timed: the result is the same on every machine.
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

struct Assignment {
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

// A lower bound of the bins: the total must fit, and a bin holds at most k sequences longer than budget / (k + 1).
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
  std::set<std::pair<int64_t, int64_t>> free_space;  // (free tokens, bin)
  for (int64_t i : order) {
    auto it = free_space.lower_bound({items.lengths[i], -1});
    int64_t b;
    int64_t free_tokens;
    if (it == free_space.end()) {
      b = static_cast<int64_t>(bins.size());
      free_tokens = budget;
      bins.emplace_back();
    } else {
      free_tokens = it->first;
      b = it->second;
      free_space.erase(it);
    }
    bins[b].add(i, items);
    free_space.insert({free_tokens - items.lengths[i], b});
  }
  return bins;
}

// Longest first, each into the lightest bin. Ignores the budget, which the caller checks after `refine`.
inline std::vector<Bin> longest_first(const Items& items, const std::vector<int64_t>& order, int64_t n_bins) {
  std::vector<Bin> bins(n_bins);
  using CostAndBin = std::pair<int64_t, int64_t>;
  std::vector<CostAndBin> heap(n_bins);
  for (int64_t b = 0; b < n_bins; ++b) heap[b] = {0, b};
  const auto greater = std::greater<CostAndBin>();
  for (int64_t i : order) {
    std::pop_heap(heap.begin(), heap.end(), greater);
    CostAndBin& lightest = heap.back();
    bins[lightest.second].add(i, items);
    lightest.first += items.costs[i];
    std::push_heap(heap.begin(), heap.end(), greater);
  }
  return bins;
}

inline bool fits(const std::vector<Bin>& bins, int64_t budget) {
  return std::all_of(bins.begin(), bins.end(), [&](const Bin& bin) { return bin.tokens <= budget; });
}

// Assigns the bins to the ranks in rounds: the heaviest bin of a round goes to the rank with the smallest load.
inline Assignment assign_to_ranks(std::vector<Bin>& bins, int64_t ranks, int64_t n_sequences) {
  const int64_t rounds = static_cast<int64_t>(bins.size()) / ranks;
  std::vector<int64_t> by_cost(bins.size());
  std::iota(by_cost.begin(), by_cost.end(), int64_t{0});
  std::stable_sort(by_cost.begin(), by_cost.end(), [&](int64_t a, int64_t b) { return bins[a].cost > bins[b].cost; });

  std::vector<int64_t> bin_of(bins.size());  // bin_of[rank * rounds + round]
  std::vector<int64_t> load(ranks, 0), by_load(ranks);
  std::iota(by_load.begin(), by_load.end(), int64_t{0});
  for (int64_t round = 0; round < rounds; ++round) {
    std::sort(by_load.begin(), by_load.end(),
              [&](int64_t a, int64_t b) { return std::make_pair(load[a], a) < std::make_pair(load[b], b); });
    for (int64_t k = 0; k < ranks; ++k) {
      const int64_t bin = by_cost[round * ranks + k];
      bin_of[by_load[k] * rounds + round] = bin;
      load[by_load[k]] += bins[bin].cost;
    }
  }

  Assignment assignment;
  assignment.n_micro_batches = rounds;
  assignment.order.reserve(n_sequences);
  assignment.offsets.push_back(0);
  for (int64_t bin : bin_of) {
    std::vector<int64_t>& sequences = bins[bin].items;
    std::sort(sequences.begin(), sequences.end());
    assignment.order.insert(assignment.order.end(), sequences.begin(), sequences.end());
    assignment.offsets.push_back(static_cast<int64_t>(assignment.order.size()));
    assignment.bin_tokens.push_back(bins[bin].tokens);
  }
  return assignment;
}

inline void check_balance(const Items& items, int64_t budget, int64_t ranks, int64_t round_to, int64_t* total) {
  require(budget >= 1, "token_budget: expected >= 1, got ", budget);
  require(ranks >= 1, "ranks: expected >= 1, got ", ranks);
  require(round_to >= 1, "round_to: expected >= 1, got ", round_to);
  int64_t min_bins;
  require(!__builtin_mul_overflow(ranks, round_to, &min_bins) && min_bins <= kMaxBins,
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

inline Assignment balance(Span<int64_t> lengths, Span<int64_t> costs, int64_t budget, int64_t ranks,
                          int64_t round_to) {
  const Items by_cost{lengths, costs};
  const Items by_length{lengths, lengths};
  int64_t total = 0;
  check_balance(by_cost, budget, ranks, round_to, &total);

  // 1. Bounds of the number of bins, in units of ranks * round_to.
  const std::vector<int64_t> order = descending(lengths);
  const auto units_of = [&](int64_t n_bins) {
    const int64_t unit = ranks * round_to;
    return std::max<int64_t>(1, n_bins / unit + (n_bins % unit != 0));
  };
  const std::vector<Bin> fallback = best_fit_decreasing(by_length, order, budget);
  int64_t low = units_of(bins_lower_bound(lengths, order, total, budget));
  int64_t high = units_of(static_cast<int64_t>(fallback.size()));
  const auto n_bins = [&](int64_t units) { return units * ranks * round_to; };
  require(n_bins(high) <= kMaxBins, "token_budget: ", budget, " asks for ", n_bins(high),
          " micro-batches, more than ", kMaxBins);

  // 2. The smallest number for which the even placement fits.
  std::vector<Bin> bins;
  const auto place_evenly = [&](int64_t units) {
    std::vector<Bin> trial = longest_first(by_length, order, n_bins(units));
    refine(trial, by_length);
    if (!fits(trial, budget)) return false;
    bins = std::move(trial);
    return true;
  };
  int64_t accepted = -1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (place_evenly(middle)) {
      accepted = high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (accepted != high && !place_evenly(high)) {  // the even placement fits nowhere: refine best-fit-decreasing
    bins = fallback;
    bins.resize(n_bins(high));
    for (Bin& bin : bins) bin.sort(by_length);
    refine(bins, by_length, budget);
  }
  // 3. With other costs than the lengths, balance the costs over the same number of bins.
  if (costs.data != lengths.data) {
    std::vector<Bin> trial = longest_first(by_cost, descending(costs), static_cast<int64_t>(bins.size()));
    if (!fits(trial, budget)) trial = std::move(bins);
    for (Bin& bin : trial) bin.recount(by_cost);
    refine(trial, by_cost, budget);
    bins = std::move(trial);
  }
  return assign_to_ranks(bins, ranks, lengths.size);
}

}  // namespace icegrt

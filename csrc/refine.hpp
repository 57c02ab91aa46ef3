// Evening out a partition: the heaviest bin trades with lighter ones until no trade lowers it.
//
// A trade hands one item a to the lighter bin and takes back one item b, or nothing. With d the difference of the two bins,
// the best trade has cost(a) - cost(b) nearest to d / 2; items sorted by cost give it in one walk over both bins.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "check.hpp"

namespace icegrt {

constexpr int64_t kMaxBins = int64_t{1} << 24;
constexpr int64_t kNoBudget = std::numeric_limits<int64_t>::max();

// lengths decide what fits, costs decide what is even. Their totals are known to fit in int64.
struct Items {
  Span<int64_t> lengths, costs;

  bool heavier(int64_t a, int64_t b) const { return costs[a] != costs[b] ? costs[a] > costs[b] : a < b; }
};

struct Bin {
  int64_t tokens = 0, cost = 0;
  std::vector<int64_t> items;  // heaviest first

  void add(int64_t i, const Items& all) {
    items.push_back(i);
    tokens += all.lengths[i];
    cost += all.costs[i];
  }
  void insert(int64_t i, const Items& all) {
    const auto heavier = [&](int64_t a, int64_t b) { return all.heavier(a, b); };
    items.insert(std::upper_bound(items.begin(), items.end(), i, heavier), i);
    tokens += all.lengths[i];
    cost += all.costs[i];
  }
  void remove(size_t at, const Items& all) {
    tokens -= all.lengths[items[at]];
    cost -= all.costs[items[at]];
    items.erase(items.begin() + static_cast<std::ptrdiff_t>(at));
  }
  void sort(const Items& all) {
    std::sort(items.begin(), items.end(), [&](int64_t a, int64_t b) { return all.heavier(a, b); });
  }
  void recount(const Items& all) {
    cost = 0;
    for (int64_t i : items) cost += all.costs[i];
    sort(all);
  }
};

struct Trade {
  size_t give = 0, take = 0;  // positions in the two bins; take == lighter.items.size() takes nothing back
  int64_t off = -1;           // distance of the moved cost from the ideal, doubled; -1: no trade helps
};

inline Trade best_trade(const Bin& heavy, const Bin& light, const Items& all, int64_t budget) {
  const int64_t gap = heavy.cost - light.cost;
  Trade best;
  size_t i = 0, j = 0;
  while (i < heavy.items.size() && j <= light.items.size()) {
    const int64_t a = heavy.items[i];
    const bool swap = j < light.items.size();
    const int64_t moved = all.costs[a] - (swap ? all.costs[light.items[j]] : 0);
    if (moved > 0 && moved < gap) {
      const int64_t grown = all.lengths[a] - (swap ? all.lengths[light.items[j]] : 0);
      const int64_t off = moved <= gap - moved ? gap - moved - moved : moved - (gap - moved);
      const bool fits = light.tokens + grown <= budget && heavy.tokens - grown <= budget;
      if (fits && (best.off < 0 || off < best.off)) best = {i, j, off};
      if (best.off == 0) break;
    }
    // Later in `light` means a smaller item back, so more is moved; later in `heavy` means less.
    if (moved < gap - moved) {
      ++j;
    } else {
      ++i;
    }
  }
  return best;
}

// Lowers the largest cost as far as single trades can. With a budget, no bin that keeps to it ever outgrows it.
inline void refine(std::vector<Bin>& bins, const Items& all, int64_t budget = kNoBudget) {
  if (bins.size() < 2) return;
  std::set<std::pair<int64_t, int64_t>> by_cost;  // (cost, bin)
  int64_t n_items = 0, total = 0;
  for (size_t b = 0; b < bins.size(); ++b) {
    by_cost.insert({bins[b].cost, static_cast<int64_t>(b)});
    n_items += static_cast<int64_t>(bins[b].items.size());
    total += bins[b].cost;
  }
  const int64_t n_bins = static_cast<int64_t>(bins.size());
  const int64_t goal = total / n_bins + (total % n_bins != 0);
  // Enough for thousands of trades at the usual sizes; a hard cap, so that no input takes quadratic time.
  int64_t effort = 256 * (n_items + n_bins);

  while (effort > 0) {
    const auto heaviest = std::prev(by_cost.end());
    if (heaviest->first <= goal) return;
    const int64_t h = heaviest->second;
    bool traded = false;
    for (auto it = by_cost.begin(); it != heaviest && effort > 0; ++it) {
      Bin& heavy = bins[h];
      Bin& light = bins[it->second];
      if (heavy.cost - light.cost < 2) break;
      effort -= static_cast<int64_t>(heavy.items.size() + light.items.size()) + 1;
      const Trade trade = best_trade(heavy, light, all, budget);
      if (trade.off < 0) continue;
      const int64_t l = it->second;
      by_cost.erase(it);
      by_cost.erase(heaviest);
      const int64_t given = heavy.items[trade.give];
      heavy.remove(trade.give, all);
      if (trade.take < light.items.size()) {
        const int64_t taken = light.items[trade.take];
        light.remove(trade.take, all);
        heavy.insert(taken, all);
      }
      light.insert(given, all);
      by_cost.insert({heavy.cost, h});
      by_cost.insert({light.cost, l});
      traded = true;
      break;
    }
    if (!traded) return;
  }
}

}  // namespace icegrt

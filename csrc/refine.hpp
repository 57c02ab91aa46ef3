// Balance a partition: the heaviest bin exchanges items with lighter bins until no exchange lowers its cost.
//
// An exchange moves one item a to the lighter bin, and one item b or none back. With gap = cost(heavy) - cost(light),
// the best exchange has cost(a) - cost(b) nearest to gap / 2. Items sorted by cost give it in one pass over both bins.
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

// The budget limits lengths; the balance is over costs. `check_balance` has checked that both totals fit in int64.
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
  void remove(size_t position, const Items& all) {
    tokens -= all.lengths[items[position]];
    cost -= all.costs[items[position]];
    items.erase(items.begin() + static_cast<std::ptrdiff_t>(position));
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

struct Exchange {
  size_t from_heavy = 0, from_light = 0;  // positions in the bins; from_light == light.items.size(): no item back
  int64_t distance = -1;                  // twice the distance of the moved cost from gap / 2; -1: no exchange helps
};

inline Exchange best_exchange(const Bin& heavy, const Bin& light, const Items& all, int64_t budget) {
  const int64_t gap = heavy.cost - light.cost;
  Exchange best;
  size_t i = 0, j = 0;
  while (i < heavy.items.size() && j <= light.items.size()) {
    const int64_t a = heavy.items[i];
    const bool has_item_back = j < light.items.size();
    const int64_t moved_cost = all.costs[a] - (has_item_back ? all.costs[light.items[j]] : 0);
    if (moved_cost > 0 && moved_cost < gap) {
      const int64_t moved_tokens = all.lengths[a] - (has_item_back ? all.lengths[light.items[j]] : 0);
      const int64_t distance =
          moved_cost <= gap - moved_cost ? gap - moved_cost - moved_cost : moved_cost - (gap - moved_cost);
      const bool fits = light.tokens + moved_tokens <= budget && heavy.tokens - moved_tokens <= budget;
      if (fits && (best.distance < 0 || distance < best.distance)) best = {i, j, distance};
      if (best.distance == 0) break;
    }
    // A later item of `light` is smaller, so the exchange moves more; a later item of `heavy` makes it move less.
    if (moved_cost < gap - moved_cost) {
      ++j;
    } else {
      ++i;
    }
  }
  return best;
}

// Lowers the largest cost as far as single exchanges can. A bin within the budget stays within it.
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
  const int64_t mean_cost = total / n_bins + (total % n_bins != 0);  // rounded up
  // A limit that allows thousands of exchanges at the usual sizes, and excludes quadratic time for any input.
  int64_t effort = 256 * (n_items + n_bins);

  while (effort > 0) {
    const auto heaviest = std::prev(by_cost.end());
    if (heaviest->first <= mean_cost) return;
    const int64_t h = heaviest->second;
    bool exchanged = false;
    for (auto it = by_cost.begin(); it != heaviest && effort > 0; ++it) {
      Bin& heavy = bins[h];
      Bin& light = bins[it->second];
      if (heavy.cost - light.cost < 2) break;
      effort -= static_cast<int64_t>(heavy.items.size() + light.items.size()) + 1;
      const Exchange exchange = best_exchange(heavy, light, all, budget);
      if (exchange.distance < 0) continue;
      const int64_t l = it->second;
      by_cost.erase(it);
      by_cost.erase(heaviest);
      const int64_t heavy_item = heavy.items[exchange.from_heavy];
      heavy.remove(exchange.from_heavy, all);
      if (exchange.from_light < light.items.size()) {
        const int64_t light_item = light.items[exchange.from_light];
        light.remove(exchange.from_light, all);
        heavy.insert(light_item, all);
      }
      light.insert(heavy_item, all);
      by_cost.insert({heavy.cost, h});
      by_cost.insert({light.cost, l});
      exchanged = true;
      break;
    }
    if (!exchanged) return;
  }
}

}  // namespace icegrt

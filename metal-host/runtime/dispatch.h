// A launch: its groups one after the other, each thread with what it may ask about itself.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "abi.h"
#include "group.h"

struct Extent {
  uint32_t x, y, z;

  uint64_t count() const { return uint64_t(x) * y * z; }
  Extent at(uint64_t index) const {
    return {uint32_t(index % x), uint32_t(index / x % y), uint32_t(index / x / y)};
  }
  MslUint3 id() const { return {x, y, z, 0}; }
};

template <class F>
Extent each(Extent a, Extent b, F f) {
  return {f(a.x, b.x), f(a.y, b.y), f(a.z, b.z)};
}

inline uint32_t divided_up(uint32_t n, uint32_t by) { return (n + by - 1) / by; }

class Dispatch {
 public:
  // `grid` and `group` count threads. As Metal does, groups at the grid's edge are smaller.
  Dispatch(Extent grid, Extent group)
      : grid_(grid),
        group_(each(grid, group, [](uint32_t a, uint32_t b) { return std::min(a, b); })),
        groups_(each(grid, group_, divided_up)) {}

  std::vector<uint64_t> groups() const {
    std::vector<uint64_t> order(groups_.count());
    for (uint64_t i = 0; i < order.size(); i++) order[i] = i;
    return order;
  }

  // What each thread of group number `index` may ask.
  std::vector<MslIds> ids(uint64_t index) const {
    Extent place = groups_.at(index);
    Extent first = each(place, group_, [](uint32_t a, uint32_t b) { return a * b; });
    Extent left = each(grid_, first, [](uint32_t a, uint32_t b) { return a - b; });
    Extent size = each(left, group_, [](uint32_t a, uint32_t b) { return std::min(a, b); });
    uint32_t threads = static_cast<uint32_t>(size.count());
    std::vector<MslIds> ids(threads, common(place, size));
    for (uint32_t i = 0; i < threads; i++) {
      Extent position = size.at(i);
      auto sum = [](uint32_t a, uint32_t b) { return a + b; };
      ids[i].thread_position_in_threadgroup = position.id();
      ids[i].thread_position_in_grid = each(first, position, sum).id();
      ids[i].thread_index_in_threadgroup = i;
      ids[i].thread_index_in_simdgroup = i % 32;
      ids[i].thread_index_in_quadgroup = i % 4;
      ids[i].simdgroup_index_in_threadgroup = i / 32;
      ids[i].quadgroup_index_in_threadgroup = i / 4;
    }
    return ids;
  }

 private:
  // What all threads of a group share.
  MslIds common(Extent place, Extent size) const {
    uint32_t threads = static_cast<uint32_t>(size.count());
    uint32_t full = static_cast<uint32_t>(group_.count());
    MslIds ids = {};
    ids.threadgroup_position_in_grid = place.id();
    ids.threads_per_threadgroup = size.id();
    ids.dispatch_threads_per_threadgroup = group_.id();
    ids.threadgroups_per_grid = groups_.id();
    ids.threads_per_grid = grid_.id();
    ids.grid_size = grid_.id();
    ids.simdgroups_per_threadgroup = divided_up(threads, 32);
    ids.quadgroups_per_threadgroup = divided_up(threads, 4);
    ids.dispatch_simdgroups_per_threadgroup = divided_up(full, 32);
    ids.dispatch_quadgroups_per_threadgroup = divided_up(full, 4);
    ids.threads_per_simdgroup = 32;
    ids.thread_execution_width = 32;
    return ids;
  }

  Extent grid_, group_, groups_;
};

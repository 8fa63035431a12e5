// In what order threads and groups go on: a GPU promises none, so a right kernel's results depend on none.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

class Schedule {
 public:
  // 0 is in order, 1 is reversed, anything else seeds a random order.
  explicit Schedule(uint64_t seed) : seed_(seed), state_(seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du) {}

  bool is_random() const { return seed_ > 1; }

  template <class T>
  void arrange(std::vector<T>& items) {
    if (seed_ == 1) std::reverse(items.begin(), items.end());
    if (!is_random()) return;
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[next() % i]);
  }

  // Whether to let the others go first, this time.
  bool hesitates() { return is_random() && next() % 2; }

 private:
  // Marsaglia's xorshift.
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 16);
  }

  uint64_t seed_;
  uint64_t state_;
};

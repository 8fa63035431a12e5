// Stacks of fibres and arrays of threadgroups.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "report.h"
#include "sanitizer.h"

// Memory straight from the system. Pages that are never touched cost nothing.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(size_t bytes) : bytes_(bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (start == MAP_FAILED) {
      perror("mmap");
      _Exit(3);
    }
    start_ = static_cast<char*>(start);
    sanitizer::forget(start_, bytes);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(Mapping&& other) {
    release();
    start_ = other.start_;
    bytes_ = other.bytes_;
    other.start_ = nullptr;
    return *this;
  }
  ~Mapping() { release(); }

  char* start() const { return start_; }
  size_t bytes() const { return start_ ? bytes_ : 0; }

 private:
  void release() {
    if (start_) munmap(start_, bytes_);
  }
  char* start_ = nullptr;
  size_t bytes_ = 0;
};

// Equal stacks in one mapping, below each a page that must not be touched: running over is a crash.
class Stacks {
 public:
  void provide(size_t count) {
    size_t needed = count * kStride;
    if (!sanitizer::kNeedsFreshMemory && memory_.bytes() >= needed) return;
    memory_ = Mapping(needed);
    for (size_t i = 0; i < count; i++) mprotect(memory_.start() + i * kStride, kGuard, PROT_NONE);
  }
  char* bottom(size_t i) const { return memory_.start() + i * kStride + kGuard; }
  char* top(size_t i) const { return bottom(i) + sanitizer::kStackBytes; }

 private:
  static constexpr size_t kGuard = 4096;
  static constexpr size_t kStride = sanitizer::kStackBytes + kGuard;
  Mapping memory_;
};

// The arrays of one threadgroup, each of exactly its size so that an overrun meets no neighbour.
class ThreadgroupMemory {
 public:
  explicit ThreadgroupMemory(uint8_t poison) : poison_(poison) {}
  ~ThreadgroupMemory() { clear(); }

  // Forgets the arrays of the last group. Called outside of any fibre.
  void clear() {
    for (void*& array : arrays_) {
      if (!sanitizer::kNeedsFreshMemory) free(array);
      array = nullptr;
    }
    used_ = 0;
    arena_used_ = 0;
    if (sanitizer::kNeedsFreshMemory) arena_ = Mapping(kArenaBytes);
  }

  // Array number `id`: made by the first thread that comes to its declaration. `limit`: for it and those before.
  void* array(unsigned id, size_t bytes, size_t limit, const report::Site* site) {
    if (id >= kArrays) report::finding("threadgroup memory", site, "more than 64 threadgroup arrays");
    if (!arrays_[id]) {
      used_ += (bytes + 15) / 16 * 16;
      if (used_ > limit) {
        report::finding("threadgroup memory", site,
                        "the threadgroup's arrays take " + std::to_string(used_) +
                            " bytes, more than " + std::to_string(limit));
      }
      arrays_[id] = allocate(bytes);
      sanitizer::fill(arrays_[id], poison_, bytes);
      sanitizer::mark_uninitialised(arrays_[id], bytes);
    }
    return arrays_[id];
  }

 private:
  static constexpr size_t kArrays = 64;
  static constexpr size_t kAlignment = 128;
  static constexpr size_t kArenaBytes = (128 << 10) + kArrays * kAlignment;

  void* allocate(size_t bytes) {
    if (sanitizer::kNeedsFreshMemory) {
      void* memory = arena_.start() + arena_used_;
      arena_used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return memory;
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes) != 0) abort();
    return memory;
  }

  uint8_t poison_;
  void* arrays_[kArrays] = {};
  size_t used_ = 0;
  size_t arena_used_ = 0;
  Mapping arena_;
};

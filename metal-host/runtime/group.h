// One threadgroup: a fibre for each of its threads, all on one thread of the host.
//
// A fibre runs until it must wait for others, at a barrier or a simdgroup function, and then goes back to the
// loop in `Group::run`, which lets go of those that all have come. Threads that never meet are a finding.
#pragma once
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"
#include "memory.h"
#include "report.h"
#include "sanitizer.h"
#include "schedule.h"
#include "switch.h"

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;

enum class State { kReady, kAtSimd, kAtSimdgroupBarrier, kAtThreadgroupBarrier, kReturned };

struct Fibre {
  unsigned index = 0;
  MslIds ids = {};
  State state = State::kReady;
  // Where it waits, and with which flags or size: those who meet must agree in both.
  const report::Site* site = nullptr;
  unsigned argument = 0;
  // The lanes that met at the last simdgroup function.
  unsigned mask = 0;
  // How often it has met others in each way.
  unsigned exchanges = 0;
  unsigned simdgroup_barriers = 0;
  unsigned threadgroup_barriers = 0;
  void* stack_pointer = nullptr;
  sanitizer::Stack stack;

  unsigned lane() const { return index % kLanes; }
  unsigned simdgroup() const { return index / kLanes; }
  bool waits_for_simdgroup() const {
    return state == State::kAtSimd || state == State::kAtSimdgroupBarrier;
  }
  bool meets(const Fibre& other) const {
    return state == other.state && argument == other.argument && *site == *other.site;
  }
};

// What the lanes of a simdgroup hand each other. Three in turn: a lane may read two, and a faster one be ahead.
struct Exchange {
  static constexpr unsigned kMaxBytes = 64;
  static constexpr unsigned kTurns = 3;
  alignas(kMaxBytes) unsigned char values[kTurns][kLanes * kMaxBytes];
  // Whether a lane has asked to be the first.
  bool asked[kTurns];
};

// What `release` and `acquire` are about: one address for each of the last few barriers.
struct BarrierTokens {
  char tokens[4];
  void* of(unsigned barrier) { return &tokens[barrier % 4]; }
};

class Group {
 public:
  Group(MslEntry entry, const unsigned long* buffers, Schedule& schedule, ThreadgroupMemory& memory)
      : entry_(entry),
        buffers_(buffers),
        schedule_(schedule),
        memory_(memory) {
    sanitizer::adopt(main_stack_);
    // Moved, they would seem to be freed while lanes read them.
    exchanges_.reserve(kMaxThreads / kLanes);
  }

  // Runs one group to its end: a thread for each of `ids`.
  void run(const std::vector<MslIds>& ids) {
    start(ids);
    while (step()) {
    }
    for (Fibre& fibre : fibres_) sanitizer::destroy(fibre.stack);
    memory_.clear();
  }

  // After the last group: what groups did is over, though they stay unordered among themselves.
  void finish() { sanitizer::acquire(&end_); }

  // ---- called by kernels, on a fibre ----

  Fibre& current() { return *current_; }
  ThreadgroupMemory& memory() { return memory_; }

  void threadgroup_barrier(unsigned flags, const report::Site* site) {
    void* token = tokens_.back().of(current_->threadgroup_barriers++);
    barrier(State::kAtThreadgroupBarrier, token, flags, site);
  }
  void simdgroup_barrier(unsigned flags, const report::Site* site) {
    void* token = tokens_[current_->simdgroup()].of(current_->simdgroup_barriers++);
    barrier(State::kAtSimdgroupBarrier, token, flags, site);
  }

  // Nothing is returned: what MemorySanitizer keeps of returned values is not switched with the fibre.
  void gather(const void* value, unsigned bytes, void** lanes, unsigned* mask,
              const report::Site* site) {
    Fibre& me = *current_;
    unsigned turn = ++me.exchanges % Exchange::kTurns;
    Exchange& exchange = exchanges_[me.simdgroup()];
    unsigned char* values = exchange.values[turn];
    sanitizer::copy(values + me.lane() * bytes, value, bytes);
    exchange.asked[turn] = false;
    wait(State::kAtSimd, bytes, site);
    for (unsigned lane = 0; lane < kLanes; lane++) {
      if (me.mask >> lane & 1) continue;
      sanitizer::fill(values + lane * bytes, 0xff, bytes);
      sanitizer::mark_uninitialised(values + lane * bytes, bytes);
    }
    *mask = me.mask;
    sanitizer::mark_initialised(mask, sizeof *mask);
    *lanes = values;
    sanitizer::mark_initialised(lanes, sizeof *lanes);
  }

  // Whether the lane is the first to ask since it gathered.
  bool is_first() {
    bool& asked = exchanges_[current_->simdgroup()].asked[current_->exchanges % Exchange::kTurns];
    return !std::exchange(asked, true);
  }

 private:
  // ---- on a fibre ----

  void barrier(State state, void* token, unsigned flags, const report::Site* site) {
    // Without flags a barrier holds threads up, but orders no memory.
    if (flags) sanitizer::release(token);
    wait(state, flags, site);
    if (flags) sanitizer::acquire(token);
  }

  void wait(State state, unsigned argument, const report::Site* site) {
    current_->state = state;
    current_->argument = argument;
    current_->site = site;
    back_to_loop(false);
  }

  void back_to_loop(bool for_good) {
    Fibre& me = *current_;
    sanitizer::leave(me.stack, main_stack_, for_good);
    msl_switch(&me.stack_pointer, main_stack_pointer_);
    sanitizer::arrive(me.stack, &main_stack_);
  }

  static void fibre_main();
  void run_fibre() {
    sanitizer::Stack fresh;
    sanitizer::arrive(fresh, &main_stack_);
    entry_(buffers_, &current_->ids);
    current_->state = State::kReturned;
    sanitizer::release(&end_);
    back_to_loop(true);
  }

  // ---- in the loop ----

  void start(const std::vector<MslIds>& ids) {
    unsigned count = static_cast<unsigned>(ids.size());
    stacks_.provide(count);
    fibres_.assign(count, Fibre{});
    exchanges_.resize((count + kLanes - 1) / kLanes);
    // Newly allocated, or a barrier would seem to order this group after the last.
    tokens_ = std::vector<BarrierTokens>(exchanges_.size() + 1);
    for (unsigned i = 0; i < count; i++) {
      Fibre& fibre = fibres_[i];
      fibre.index = i;
      fibre.ids = ids[i];
      sanitizer::mark_initialised(&fibre.ids, sizeof fibre.ids);
      fibre.stack_pointer = fresh_stack(stacks_.top(i), fibre_main);
      sanitizer::create(fibre.stack, stacks_.bottom(i), sanitizer::kStackBytes);
    }
  }

  // Lets every thread that can go on do so, or lets go of some that wait; false when all have returned.
  bool step() {
    std::vector<Fibre*> ready;
    for (Fibre& fibre : fibres_) {
      if (fibre.state == State::kReady) ready.push_back(&fibre);
    }
    if (ready.empty()) {
      bool all = std::all_of(fibres_.begin(), fibres_.end(),
                             [](const Fibre& fibre) { return fibre.state == State::kReturned; });
      if (all) return false;
      if (!release_simdgroups()) release_threadgroup();
      return true;
    }
    schedule_.arrange(ready);
    for (Fibre* fibre : ready) {
      if (schedule_.hesitates()) continue;
      resume(*fibre);
      // Simdgroups do not go in step, so one that has met need not wait for the others.
      if (has_met(fibre->simdgroup())) release_simdgroup(fibre->simdgroup());
    }
    return true;
  }

  void resume(Fibre& fibre) {
    current_ = &fibre;
    sanitizer::leave(main_stack_, fibre.stack, false);
    msl_switch(&main_stack_pointer_, fibre.stack_pointer);
    sanitizer::arrive(main_stack_, nullptr);
    current_ = nullptr;
  }

  unsigned first_of(unsigned simdgroup) const { return simdgroup * kLanes; }
  unsigned end_of(unsigned simdgroup) const {
    return std::min<unsigned>(first_of(simdgroup + 1), static_cast<unsigned>(fibres_.size()));
  }

  // Whether every lane waits at the same place.
  bool has_met(unsigned simdgroup) const {
    const Fibre& first = fibres_[first_of(simdgroup)];
    if (!first.waits_for_simdgroup()) return false;
    for (unsigned i = first_of(simdgroup) + 1; i < end_of(simdgroup); i++) {
      if (!fibres_[i].meets(first)) return false;
    }
    return true;
  }

  void release_simdgroup(unsigned simdgroup) {
    unsigned lanes = end_of(simdgroup) - first_of(simdgroup);
    unsigned mask = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    for (unsigned i = first_of(simdgroup); i < end_of(simdgroup); i++) {
      fibres_[i].mask = mask;
      fibres_[i].state = State::kReady;
    }
  }

  // With no thread ready: whether a simdgroup could go on. A lane that waits alone waits for ever.
  bool release_simdgroups() {
    bool any = false;
    for (unsigned simdgroup = 0; simdgroup < exchanges_.size(); simdgroup++) {
      if (has_met(simdgroup)) {
        release_simdgroup(simdgroup);
        any = true;
      } else {
        check_alone(simdgroup);
      }
    }
    return any;
  }

  void check_alone(unsigned simdgroup) const {
    const Fibre* waiting = nullptr;
    for (unsigned i = first_of(simdgroup); i < end_of(simdgroup); i++) {
      if (!waiting && fibres_[i].waits_for_simdgroup()) waiting = &fibres_[i];
    }
    if (!waiting) return;
    for (unsigned i = first_of(simdgroup); i < end_of(simdgroup); i++) {
      if (!fibres_[i].meets(*waiting)) diverge(*waiting, fibres_[i]);
    }
  }

  // With no thread ready and no simdgroup to release: all must be at one barrier.
  void release_threadgroup() {
    const Fibre* waiting = nullptr;
    for (const Fibre& fibre : fibres_) {
      if (!waiting && fibre.state == State::kAtThreadgroupBarrier) waiting = &fibre;
    }
    for (const Fibre& fibre : fibres_) {
      if (!fibre.meets(*waiting)) diverge(*waiting, fibre);
    }
    for (Fibre& fibre : fibres_) fibre.state = State::kReady;
  }

  [[noreturn]] static void diverge(const Fibre& waiting, const Fibre& other) {
    report::finding("divergence", waiting.site, described(waiting) + ", but " + described(other));
  }

  static std::string described(const Fibre& fibre) {
    std::string thread = "thread " + std::to_string(fibre.index);
    if (fibre.state == State::kReturned) return thread + " has returned";
    const char* what = fibre.state == State::kAtSimd             ? "simdgroup function"
                       : fibre.state == State::kAtSimdgroupBarrier ? "simdgroup_barrier"
                                                                   : "threadgroup_barrier";
    return thread + " waits at the " + what + " in line " + std::to_string(fibre.site->line);
  }

  MslEntry entry_;
  const unsigned long* buffers_;
  Schedule& schedule_;
  ThreadgroupMemory& memory_;
  Stacks stacks_;
  std::vector<Fibre> fibres_;
  std::vector<Exchange> exchanges_;
  // One for each simdgroup, and the last for the threadgroup.
  std::vector<BarrierTokens> tokens_;
  char end_ = 0;
  Fibre* current_ = nullptr;
  void* main_stack_pointer_ = nullptr;
  sanitizer::Stack main_stack_;
};

// The group that runs now. There is one at a time, in one process for each launch.
inline Group* the_group = nullptr;

inline void Group::fibre_main() {
  the_group->run_fibre();
  abort();
}

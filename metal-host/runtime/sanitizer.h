// What the three sanitizers must be told about fibres and about GPU memory, in the words of what happens. The
// runtime itself is never instrumented, only linked with a sanitizer, so its own memory stays invisible.
#pragma once
#include <cstddef>

#if defined(MSL_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(MSL_THREAD)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#elif defined(MSL_MEMORY)
#include <sanitizer/msan_interface.h>
// Kernels are compiled to keep track, which the sanitizer must know before one is loaded.
extern "C" {
extern const int __msan_track_origins;
const int __msan_track_origins = 2;
}
#endif

namespace sanitizer {

// AddressSanitizer's and MemorySanitizer's frames are larger.
#if defined(MSL_ADDRESS) || defined(MSL_MEMORY)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// ThreadSanitizer remembers accesses by address: memory used anew must be mapped anew.
#if defined(MSL_THREAD)
constexpr bool kNeedsFreshMemory = true;
#else
constexpr bool kNeedsFreshMemory = false;
#endif

// What a sanitizer keeps for one stack.
struct Stack {
#if defined(MSL_ADDRESS)
  void* fake_frames = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
#elif defined(MSL_THREAD)
  void* fibre = nullptr;
#endif
};

inline void create(Stack& stack, void* bottom, size_t bytes) {
#if defined(MSL_ADDRESS)
  stack.bottom = bottom;
  stack.bytes = bytes;
#elif defined(MSL_THREAD)
  stack.fibre = __tsan_create_fiber(0);
#endif
  (void)stack, (void)bottom, (void)bytes;
}

inline void destroy(Stack& stack) {
#if defined(MSL_THREAD)
  __tsan_destroy_fiber(stack.fibre);
#endif
  (void)stack;
}

// The stack that the process started on.
inline void adopt(Stack& stack) {
#if defined(MSL_THREAD)
  stack.fibre = __tsan_get_current_fiber();
#endif
  (void)stack;
}

// Right before a switch. A stack that is left for good gives up its frames.
inline void leave(Stack& from, Stack& to, bool for_good) {
#if defined(MSL_ADDRESS)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_frames, to.bottom, to.bytes);
#elif defined(MSL_THREAD)
  // A switch orders nothing: only barriers do.
  __tsan_switch_to_fiber(to.fibre, __tsan_switch_to_fiber_no_sync);
#endif
  (void)from, (void)to, (void)for_good;
}

// Right after a switch, on the stack switched to. `from` learns where it lies: the first stack does not know.
inline void arrive(Stack& to, Stack* from) {
#if defined(MSL_ADDRESS)
  __sanitizer_finish_switch_fiber(to.fake_frames, from ? &from->bottom : nullptr,
                                  from ? &from->bytes : nullptr);
#endif
  (void)to, (void)from;
}

// All that was done before a `release` happens before what follows an `acquire` of the same address.
inline void release(void* address) {
#if defined(MSL_THREAD)
  __tsan_release(address);
#endif
  (void)address;
}
inline void acquire(void* address) {
#if defined(MSL_THREAD)
  __tsan_acquire(address);
#endif
  (void)address;
}

inline void forget(void* memory, size_t bytes) {
#if defined(MSL_ADDRESS)
  __asan_unpoison_memory_region(memory, bytes);
#endif
  (void)memory, (void)bytes;
}

inline void mark_uninitialised(void* memory, size_t bytes) {
#if defined(MSL_MEMORY)
  __msan_allocated_memory(memory, bytes);
#endif
  (void)memory, (void)bytes;
}

inline void mark_initialised(const void* memory, size_t bytes) {
#if defined(MSL_MEMORY)
  __msan_unpoison(memory, bytes);
#endif
  (void)memory, (void)bytes;
}

// The first byte that was never given a value, or -1.
inline long first_uninitialised(const void* memory, size_t bytes) {
#if defined(MSL_MEMORY)
  return __msan_test_shadow(memory, bytes);
#endif
  (void)memory, (void)bytes;
  return -1;
}

// Tells where the value of uninitialised memory came from.
inline void tell_origin(const void* memory) {
#if defined(MSL_MEMORY)
  __msan_set_keep_going(1);
  __msan_check_mem_is_initialized(memory, 1);
#endif
  (void)memory;
}

// Plain loops where a call of memset or memcpy would count as an access by the fibre.
inline void fill(void* memory, unsigned char byte, size_t bytes) {
  auto to = static_cast<volatile unsigned char*>(memory);
  for (size_t i = 0; i < bytes; i++) to[i] = byte;
}
inline void copy(void* target, const void* source, size_t bytes) {
#if defined(MSL_THREAD)
  auto to = static_cast<volatile unsigned char*>(target);
  auto from = static_cast<const volatile unsigned char*>(source);
  for (size_t i = 0; i < bytes; i++) to[i] = from[i];
#else
  // MemorySanitizer copies what it knows of the bytes along, but only if asked by a call.
  __builtin_memcpy(target, source, bytes);
#endif
}

}  // namespace sanitizer

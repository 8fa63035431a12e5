// Metal's words that C++ lacks: address spaces, scalar types, the calls into the runtime.
//
// The address spaces are real. clang knows OpenCL's as type attributes, in C++ too; on a CPU all of them
// are flat memory, so the code runs natively and the sanitizers see it, yet a threadgroup pointer does not
// convert to a device pointer, just as in Metal. `thread` is the space of unqualified pointers.
#pragma once

#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant __attribute__((opencl_constant))
#define thread
// An empty attribute list is left of [[kernel]].
#define kernel
// Apple's is always inlined, which here would only be more to compile. But of a store MemorySanitizer keeps no more than
// one frame: for it to be the kernel's, not this library's, the library is part of it.
#if __has_feature(memory_sanitizer)
#define METAL_FUNC inline __attribute__((always_inline))
#else
#define METAL_FUNC inline
#endif

#define __METAL__ 1
#define __METAL_MACOS__ 1
#define __METAL_VERSION__ 310

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef _Float16 half;
typedef __bf16 bfloat;

constexpr half operator""h(long double value) { return (half)value; }
constexpr bfloat operator""bf(long double value) { return (bfloat)(float)value; }

// The one type that __builtin_source_location() gives: where a function's caller stands.
namespace std {
struct source_location {
  struct __impl {
    const char* _M_file_name;
    const char* _M_function_name;
    unsigned _M_line;
    unsigned _M_column;
  };
};
}  // namespace std

namespace msl {
typedef std::source_location::__impl Site;
}

// The last parameter of every function at which threads meet.
#define MSL_SITE const msl::Site* site = __builtin_source_location()

extern "C" {
// The threadgroup's array number `id`, the same for all its threads.
threadgroup void* msl_threadgroup_array(uint id, ulong bytes, ulong limit, const msl::Site* site);
// Waits for the threadgroup, or for the simdgroup.
void msl_threadgroup_barrier(uint flags, const msl::Site* site);
void msl_simdgroup_barrier(uint flags, const msl::Site* site);
// Waits for the simdgroup and points `*lanes` to every lane's `bytes` at `value`, one after the other, which stay until
// the lane has gathered twice more; `mask` says which lanes exist.
void msl_gather(const void* value, uint bytes, void** lanes, uint* mask, const msl::Site* site);
// Whether this lane is the first of its simdgroup to ask since it gathered.
bool msl_is_first();
// This thread's place in its simdgroup.
uint msl_lane();
}

namespace msl {
template <class T>
using same = T;
}

#define MSL_THREADGROUP_ARRAY(T, name, extents, kilobytes)       \
  threadgroup msl::same<T extents>& name =                       \
      *(threadgroup msl::same<T extents>*)msl_threadgroup_array( \
          __COUNTER__, sizeof(T extents), (kilobytes) * 1024, __builtin_source_location())
// What every Apple GPU has, and what NVIDIA's have for one array alone.
#define THREADGROUP_ARRAY(T, name, extents) MSL_THREADGROUP_ARRAY(T, name, extents, 32)
#define LARGE_THREADGROUP_ARRAY(T, name, extents) MSL_THREADGROUP_ARRAY(T, name, extents, 99)
#define MAKE_VEC(T, n) msl::make<metal::vec<T, n>>
// No loop is worth unrolling here: sanitized, it takes four times as long to compile.
#define UNROLL

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
};
METAL_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}
METAL_FUNC void threadgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_threadgroup_barrier((uint)flags, site);
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, MSL_SITE) {
  msl_simdgroup_barrier((uint)flags, site);
}
}  // namespace metal

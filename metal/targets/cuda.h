// MSL's words in CUDA's C++, so that one text is compiled for both. MLX includes CUDA's own headers before this.
//
// Every lane of a warp that has threads must reach a simd_* function. A grid is made of full groups, and groups of
// whole warps where simd_* functions are used.

#define METAL_CUDA 1
#define METAL_FUNC __device__ __forceinline__
#define THREADGROUP_ARRAY(type, name, extents) __shared__ __align__(16) type name extents
// Above 48 KB an array gets its size from the launch. The alignment is what Hopper's matrix instructions ask for.
#define LARGE_THREADGROUP_ARRAY(type, name, extents)      \
  extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define WRITTEN(type, name) (const_cast<type*>(name))
#define UNROLL _Pragma("unroll")

// CUDA has one generic address space.
#define device
#define constant
#define thread
#define threadgroup

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef __half float16_t;
typedef __half half;
typedef __nv_bfloat16 bfloat16_t;
typedef __nv_bfloat16 bfloat;

namespace metal {

// ---- positions

METAL_FUNC uint index_in_group() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
METAL_FUNC uint threads_of_group() { return blockDim.x * blockDim.y * blockDim.z; }
METAL_FUNC uint3 position_in_group() { return make_uint3(threadIdx.x, threadIdx.y, threadIdx.z); }
METAL_FUNC uint3 position_of_group() { return make_uint3(blockIdx.x, blockIdx.y, blockIdx.z); }
METAL_FUNC uint3 size_of_group() { return make_uint3(blockDim.x, blockDim.y, blockDim.z); }
METAL_FUNC uint3 groups() { return make_uint3(gridDim.x, gridDim.y, gridDim.z); }
METAL_FUNC uint3 position_in_grid() {
  return make_uint3(
      blockIdx.x * blockDim.x + threadIdx.x,
      blockIdx.y * blockDim.y + threadIdx.y,
      blockIdx.z * blockDim.z + threadIdx.z);
}

// ---- barriers

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
METAL_FUNC void threadgroup_barrier(mem_flags) { __syncthreads(); }
METAL_FUNC void simdgroup_barrier(mem_flags) { __syncwarp(); }

// ---- simd groups

constexpr uint ALL_LANES = 0xffffffffu;

template <typename T> METAL_FUNC T simd_shuffle(T x, ushort lane) { return __shfl_sync(ALL_LANES, x, lane); }
template <typename T> METAL_FUNC T simd_broadcast(T x, ushort lane) { return __shfl_sync(ALL_LANES, x, lane); }
template <typename T> METAL_FUNC T simd_shuffle_xor(T x, ushort mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
template <typename T> METAL_FUNC T simd_shuffle_up(T x, ushort delta) { return __shfl_up_sync(ALL_LANES, x, delta); }
template <typename T> METAL_FUNC T simd_shuffle_down(T x, ushort delta) { return __shfl_down_sync(ALL_LANES, x, delta); }

template <typename T> METAL_FUNC T simd_sum(T x) {
  for (int mask = 16; mask > 0; mask /= 2) x = x + __shfl_xor_sync(ALL_LANES, x, mask);
  return x;
}
template <typename T> METAL_FUNC T simd_max(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = __shfl_xor_sync(ALL_LANES, x, mask);
    x = other > x ? other : x;
  }
  return x;
}
template <typename T> METAL_FUNC T simd_min(T x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = __shfl_xor_sync(ALL_LANES, x, mask);
    x = other < x ? other : x;
  }
  return x;
}
template <typename T> METAL_FUNC T simd_prefix_inclusive_sum(T x) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const T before = __shfl_up_sync(ALL_LANES, x, delta);
    if ((index_in_group() & 31u) >= delta) x = x + before;
  }
  return x;
}
METAL_FUNC bool simd_all(bool x) { return __all_sync(ALL_LANES, x); }
METAL_FUNC bool simd_any(bool x) { return __any_sync(ALL_LANES, x); }

// ---- counters that threads share

typedef uint atomic_uint;
enum memory_order : int { memory_order_relaxed = 0 };
METAL_FUNC uint atomic_load_explicit(const atomic_uint* at, memory_order) {
  return *reinterpret_cast<const volatile uint*>(at);
}
METAL_FUNC void atomic_store_explicit(atomic_uint* at, uint value, memory_order) {
  *reinterpret_cast<volatile uint*>(at) = value;
}
METAL_FUNC uint atomic_fetch_add_explicit(atomic_uint* at, uint value, memory_order) {
  return atomicAdd(at, value);
}

// ---- copies to shared memory that take no registers, for common/chunk.metal

METAL_FUNC void begin_copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(uint(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
METAL_FUNC void finish_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

// ---- registers, for common/columns.metal and common/tile.metal: what is computed from these bits before is computed anew after

METAL_FUNC void forget(ushort& bits) { asm volatile("" : "+h"(bits)); }
METAL_FUNC void forget(uint& bits) { asm volatile("" : "+r"(bits)); }
METAL_FUNC void forget(uint2& bits) { asm volatile("" : "+r"(bits.x), "+r"(bits.y)); }
METAL_FUNC void forget(uint4& bits) {
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
}

// ---- matrices, for common/tile.metal: MSL has them as simdgroup_matrix, of other sizes

// Loads 16 by 16 numbers of 16 bits by quarters, of which each lane gets two neighbours. Lane 8 i + j gives the start of
// row j of quarter i, on 16 bytes.
template <typename T> METAL_FUNC void load_quarters(T* values, const T* row) {
  uint parts[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(uint(__cvta_generic_to_shared(row)))
               : "memory");
  memcpy(values, parts, sizeof(parts));
}
// The same, with two neighbours of a column.
template <typename T> METAL_FUNC void load_quarters_transposed(T* values, const T* row) {
  uint parts[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
               : "r"(uint(__cvta_generic_to_shared(row)))
               : "memory");
  memcpy(values, parts, sizeof(parts));
}
// Of 8 by 8 numbers of 16 bits, of which lane 4 r + c holds those of row r at columns 2 c and 2 c + 1, the transpose.
METAL_FUNC uint transpose_quarter(uint pair) {
  uint transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}
// Adds to `sum`, 16 by 8, the product of `left`, 16 by 16, and the 16 by 8 whose upper half is `upper`.
METAL_FUNC void multiply_add(float* sum, const uint* left, uint upper, uint lower, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(upper), "r"(lower));
}
METAL_FUNC void multiply_add(float* sum, const uint* left, uint upper, uint lower, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(upper), "r"(lower));
}

// The nearest float with 10 bits of a fraction, of two the larger; NaN may become a number.
METAL_FUNC float leading_bits(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u); }
// Adds to `sum`, 16 by 8, the product of `left`, 16 by 8, and 8 by 8 floats, all of so few bits.
METAL_FUNC void multiply_add(float* sum, const float* left, float upper, float lower) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(__float_as_uint(left[0])), "r"(__float_as_uint(left[1])), "r"(__float_as_uint(left[2])),
                 "r"(__float_as_uint(left[3])), "r"(__float_as_uint(upper)), "r"(__float_as_uint(lower)));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define METAL_WARPGROUPS 1

// ---- matrices of four warps, for common/team.metal: the instructions of Hopper alone, which run on while their warps do
// something else

// What threads have written reaches these instructions by another way than threads.
METAL_FUNC void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// How they are told of a panel: its address in units of 16 bytes, 1024 bytes from eight rows to the next, and that chunks go
// round by the row.
typedef unsigned long long Panel;
METAL_FUNC Panel panel_at(const void* panel) {
  const Panel start = (uint(__cvta_generic_to_shared(panel)) & 0x3ffffu) >> 4;
  return start | 64ull << 16 | 64ull << 32 | 1ull << 62;
}

// The 64 by 64 sums that four warps hold in four tiles each.
#define METAL_TILE_OPERANDS(tile)                                                                   \
  "+f"(tile.values[0]), "+f"(tile.values[1]), "+f"(tile.values[2]), "+f"(tile.values[3]),           \
      "+f"(tile.values[4]), "+f"(tile.values[5]), "+f"(tile.values[6]), "+f"(tile.values[7])
#define METAL_SUM_OPERANDS(sums)                                                                    \
  METAL_TILE_OPERANDS(sums[0]), METAL_TILE_OPERANDS(sums[1]), METAL_TILE_OPERANDS(sums[2]), METAL_TILE_OPERANDS(sums[3])
// The compiler knows nothing of registers that are written while their warps go on: what it does with sums before the first
// instruction and after the last stays there.
template <typename Tile>
METAL_FUNC void hold(Tile* sums, int tiles) {
  UNROLL
  for (int t = 0; t < tiles; t++) asm volatile("" : METAL_TILE_OPERANDS(sums[t]) : : "memory");
}
template <typename Tile>
METAL_FUNC void begin_products(Tile* sums, int tiles) {
  hold(sums, tiles);
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}
template <typename Tile>
METAL_FUNC void finish_products(Tile* sums, int tiles) {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" : : : "memory");
  hold(sums, tiles);
}

#define METAL_SUMS                                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
// multiply_panels adds the products of 64 rows and 64 columns, 16 numbers long, or begins with them; multiply_by_panel those
// of 64 rows, of which each warp holds 16 as a tile, and of 16 rows of 64 columns.
#define METAL_PRODUCTS(type, name)                                                                  \
  template <typename Tile>                                                                          \
  METAL_FUNC void multiply_panels(Tile* sums, Panel rows, Panel columns, bool add, type) {          \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0;"                                        \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " METAL_SUMS         \
                 ", %32, %33, add, 1, 1, 0, 0;}"                                                    \
                 : METAL_SUM_OPERANDS(sums)                                                         \
                 : "l"(rows), "l"(columns), "r"(int(add)));                                         \
  }                                                                                                 \
  template <typename Tile>                                                                          \
  METAL_FUNC void multiply_by_panel(Tile* sums, uint4 left, Panel panel, type) {                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " METAL_SUMS         \
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                         \
                 : METAL_SUM_OPERANDS(sums)                                                         \
                 : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "l"(panel));                 \
  }
METAL_PRODUCTS(__half, "f16")
METAL_PRODUCTS(__nv_bfloat16, "bf16")
#undef METAL_PRODUCTS
#undef METAL_SUMS
#undef METAL_SUM_OPERANDS
#undef METAL_TILE_OPERANDS

#endif

// ---- numbers

// Whether a type of 16 bits has 8 of them for the exponent.
template <typename T> constexpr METAL_FUNC bool is_coarse(T) { return false; }
constexpr METAL_FUNC bool is_coarse(__nv_bfloat16) { return true; }

#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f

template <typename To, typename From> METAL_FUNC To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the number of bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

METAL_FUNC float exp(float x) { return expf(x); }
METAL_FUNC float exp2(float x) { return exp2f(x); }
METAL_FUNC float log(float x) { return logf(x); }
METAL_FUNC float log2(float x) { return log2f(x); }
METAL_FUNC float sqrt(float x) { return sqrtf(x); }
METAL_FUNC float rsqrt(float x) { return rsqrtf(x); }
METAL_FUNC float sin(float x) { return sinf(x); }
METAL_FUNC float cos(float x) { return cosf(x); }
METAL_FUNC float sinpi(float x) { return sinpif(x); }
METAL_FUNC float cospi(float x) { return cospif(x); }
METAL_FUNC float tanh(float x) { return tanhf(x); }
METAL_FUNC float fabs(float x) { return fabsf(x); }
METAL_FUNC float floor(float x) { return floorf(x); }
METAL_FUNC float ceil(float x) { return ceilf(x); }
METAL_FUNC float rint(float x) { return rintf(x); }
METAL_FUNC float pow(float x, float y) { return powf(x, y); }
METAL_FUNC float fma(float x, float y, float z) { return fmaf(x, y, z); }
METAL_FUNC bool isnan(float x) { return x != x; }
template <typename T> METAL_FUNC T min(T x, T y) { return y < x ? y : x; }
template <typename T> METAL_FUNC T max(T x, T y) { return x < y ? y : x; }
METAL_FUNC float min(float x, float y) { return fminf(x, y); }
METAL_FUNC float max(float x, float y) { return fmaxf(x, y); }
template <typename T> METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }

namespace fast {

METAL_FUNC float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
METAL_FUNC float divide(float x, float y) { return __fdividef(x, y); }
METAL_FUNC float tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
METAL_FUNC float sin(float x) { return __sinf(x); }
METAL_FUNC float cos(float x) { return __cosf(x); }

}  // namespace fast

}  // namespace metal

using metal::mem_flags;
using metal::as_type;
using metal::threadgroup_barrier;
using metal::simdgroup_barrier;
using metal::simd_shuffle;
using metal::simd_broadcast;
using metal::simd_shuffle_xor;
using metal::simd_shuffle_up;
using metal::simd_shuffle_down;
using metal::simd_sum;
using metal::simd_max;
using metal::simd_min;
using metal::simd_prefix_inclusive_sum;
using metal::simd_all;
using metal::simd_any;
using metal::atomic_uint;
using metal::memory_order_relaxed;
using metal::atomic_load_explicit;
using metal::atomic_store_explicit;
using metal::atomic_fetch_add_explicit;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

#define thread_position_in_grid metal::position_in_grid()
#define thread_position_in_threadgroup metal::position_in_group()
#define threadgroup_position_in_grid metal::position_of_group()
#define threads_per_threadgroup metal::size_of_group()
#define threadgroups_per_grid metal::groups()
#define thread_index_in_threadgroup metal::index_in_group()
#define thread_index_in_simdgroup (metal::index_in_group() & 31u)
#define simdgroup_index_in_threadgroup (metal::index_in_group() / 32u)
#define simdgroups_per_threadgroup ((metal::threads_of_group() + 31u) / 32u)

// Of what MLX puts before a kernel's header, the part that kernels may use: type names, limits, ceildiv, and
// what Metal's functions lack for bfloat, 64-bit integers and bool.
#pragma once
#include <metal_stdlib>

using namespace metal;

typedef half float16_t;
typedef bfloat bfloat16_t;

template <typename U>
struct Limits {
  static constexpr constant bool is_integer = numeric_limits<U>::is_integer;
  static constexpr constant U finite_max = numeric_limits<U>::max();
  static constexpr constant U finite_min = numeric_limits<U>::lowest();
  static constexpr constant U max = is_integer ? finite_max : (U)INFINITY;
  static constexpr constant U min = is_integer ? finite_min : (U)-INFINITY;
};

inline size_t ceildiv(size_t n, size_t m) { return (n + m - 1) / m; }

inline float log1p(float x) { return __builtin_log1pf(x); }
inline bfloat16_t log1p(bfloat16_t x) { return (bfloat16_t)__builtin_log1pf((float)x); }

// A bfloat is computed as a float and rounded once.
#define MSL_BFLOAT_1(name) \
  METAL_FUNC bfloat16_t name(bfloat16_t x) { return (bfloat16_t)name((float)x); }
#define MSL_BFLOAT_2(name)                                 \
  METAL_FUNC bfloat16_t name(bfloat16_t x, bfloat16_t y) { \
    return (bfloat16_t)name((float)x, (float)y);           \
  }
#define MSL_BFLOAT_3(name)                                               \
  METAL_FUNC bfloat16_t name(bfloat16_t x, bfloat16_t y, bfloat16_t z) { \
    return (bfloat16_t)name((float)x, (float)y, (float)z);               \
  }
#define MSL_BFLOAT_MATH                                                                     \
  MSL_BFLOAT_1(abs) MSL_BFLOAT_1(acos) MSL_BFLOAT_1(acosh) MSL_BFLOAT_1(asin)               \
  MSL_BFLOAT_1(asinh) MSL_BFLOAT_1(atan) MSL_BFLOAT_1(atanh) MSL_BFLOAT_1(ceil)             \
  MSL_BFLOAT_1(cos) MSL_BFLOAT_1(cosh) MSL_BFLOAT_1(cospi) MSL_BFLOAT_1(exp)                \
  MSL_BFLOAT_1(exp2) MSL_BFLOAT_1(exp10) MSL_BFLOAT_1(fabs) MSL_BFLOAT_1(floor)             \
  MSL_BFLOAT_1(fract) MSL_BFLOAT_1(log) MSL_BFLOAT_1(log2) MSL_BFLOAT_1(log10)              \
  MSL_BFLOAT_1(rint) MSL_BFLOAT_1(round) MSL_BFLOAT_1(rsqrt) MSL_BFLOAT_1(sin)              \
  MSL_BFLOAT_1(sinh) MSL_BFLOAT_1(sinpi) MSL_BFLOAT_1(sqrt) MSL_BFLOAT_1(tan)               \
  MSL_BFLOAT_1(tanh) MSL_BFLOAT_1(tanpi) MSL_BFLOAT_1(trunc)                                \
  MSL_BFLOAT_2(atan2) MSL_BFLOAT_2(divide) MSL_BFLOAT_2(fdim) MSL_BFLOAT_2(fmax)            \
  MSL_BFLOAT_2(fmin) MSL_BFLOAT_2(fmod) MSL_BFLOAT_2(max) MSL_BFLOAT_2(min)                 \
  MSL_BFLOAT_2(pow) MSL_BFLOAT_2(powr)                                                      \
  MSL_BFLOAT_3(fma) MSL_BFLOAT_3(max3) MSL_BFLOAT_3(min3)
namespace metal {
MSL_BFLOAT_MATH
namespace fast {
MSL_BFLOAT_MATH
}
namespace precise {
MSL_BFLOAT_MATH
}

// Moves bits only, so a type of another size or kind is moved as one that Metal's functions take.
#define MSL_MOVE(name, T, As)                                                       \
  METAL_FUNC T name(T x, ushort by, MSL_SITE) {                                     \
    return msl::bit_cast<T>(name(msl::bit_cast<As>(x), by, site));                  \
  }
#define MSL_MOVES(T, As)                  \
  MSL_MOVE(simd_shuffle, T, As)           \
  MSL_MOVE(simd_shuffle_up, T, As)        \
  MSL_MOVE(simd_shuffle_down, T, As)
MSL_MOVES(bfloat16_t, ushort)
MSL_MOVE(simd_broadcast, bfloat16_t, ushort)
MSL_MOVE(simd_shuffle_xor, bfloat16_t, ushort)
MSL_MOVE(simd_shuffle_rotate_up, bfloat16_t, ushort)
MSL_MOVE(simd_shuffle_rotate_down, bfloat16_t, ushort)
}  // namespace metal
// Where MLX has them: outside the namespace.
MSL_MOVES(int64_t, uint2)
MSL_MOVES(uint64_t, uint2)
MSL_MOVES(bool, uchar)

namespace metal {
// A template, for Metal would not make a bfloat of an argument of another type.
#define MSL_BFLOAT_REDUCE(name)                                               \
  template <class T>                                                          \
  METAL_FUNC enable_if_t<is_same_v<T, bfloat16_t>, T> name(T x, MSL_SITE) {   \
    return (bfloat16_t)name((float)x, site);                                  \
  }
MSL_BFLOAT_REDUCE(simd_sum)
MSL_BFLOAT_REDUCE(simd_product)
MSL_BFLOAT_REDUCE(simd_max)
MSL_BFLOAT_REDUCE(simd_min)
MSL_BFLOAT_REDUCE(simd_prefix_inclusive_sum)
MSL_BFLOAT_REDUCE(simd_prefix_exclusive_sum)
MSL_BFLOAT_REDUCE(simd_prefix_inclusive_product)
MSL_BFLOAT_REDUCE(simd_prefix_exclusive_product)
}  // namespace metal

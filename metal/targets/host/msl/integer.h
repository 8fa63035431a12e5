// <metal_integer>.
#pragma once

namespace metal {
template <class T>
METAL_FUNC ulong msl_bits(T value) {
  constexpr ulong mask = sizeof(T) == 8 ? ~0ul : (1ul << (sizeof(T) * 8 % 64)) - 1;
  return (ulong)value & mask;
}

#define MSL_INTEGER(T)                                                                 \
  METAL_FUNC T max(T a, T b) { return a > b ? a : b; }                                 \
  METAL_FUNC T min(T a, T b) { return a < b ? a : b; }                                 \
  METAL_FUNC T max3(T a, T b, T c) { return max(a, max(b, c)); }                       \
  METAL_FUNC T min3(T a, T b, T c) { return min(a, min(b, c)); }                       \
  METAL_FUNC T clamp(T x, T low, T high) { return x < low ? low : x > high ? high : x; } \
  METAL_FUNC T abs(T a) { return a < (T)0 ? (T)-a : a; }                               \
  METAL_FUNC T popcount(T a) { return (T)__builtin_popcountl(msl_bits(a)); }           \
  METAL_FUNC T ctz(T a) { return a ? (T)__builtin_ctzl(msl_bits(a)) : (T)(8 * sizeof(T)); } \
  METAL_FUNC T clz(T a) {                                                              \
    constexpr int width = 8 * sizeof(T);                                               \
    return a ? (T)(__builtin_clzl(msl_bits(a)) - (64 - width)) : (T)width;             \
  }                                                                                    \
  MSL_VECTORS_2(max, T)                                                                \
  MSL_VECTORS_2(min, T)                                                                \
  MSL_VECTORS_1(abs, T)
MSL_INTEGER(char)
MSL_INTEGER(uchar)
MSL_INTEGER(short)
MSL_INTEGER(ushort)
MSL_INTEGER(int)
MSL_INTEGER(uint)
MSL_INTEGER(long)
MSL_INTEGER(ulong)

METAL_FUNC int mulhi(int a, int b) { return (int)((long)a * b >> 32); }
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC uint rotate(uint x, uint n) { return __builtin_rotateleft32(x, n & 31); }
METAL_FUNC uint extract_bits(uint x, uint from, uint count) {
  uint mask = count >= 32 ? ~0u : (1u << count) - 1;
  return from >= 32 ? 0 : (x >> from) & mask;
}
}  // namespace metal

// <metal_simdgroup>: every function is computed from one exchange of all lanes' values.
#pragma once

namespace msl {
// The values of a simdgroup's lanes, which they share. A lane that does not exist reads as bytes of 0xFF, which is NaN.
template <class T>
struct Lanes {
  T* values;
  uint mask;
  uint own;

  bool has(uint lane) const { return mask >> lane & 1; }
  // The value of `lane`, or `other` beyond either end.
  T at(uint lane, T other) const { return lane < 32 ? values[lane] : other; }
};

template <class T>
METAL_FUNC Lanes<T> gather(T value, MSL_SITE) {
  Lanes<T> lanes;
  msl_gather(&value, sizeof(T), (void**)&lanes.values, &lanes.mask, site);
  lanes.own = msl_lane();
  return lanes;
}

struct Sum {
  template <class T>
  static T of(T a, T b) {
    return (T)(a + b);
  }
};
struct Product {
  template <class T>
  static T of(T a, T b) {
    return (T)(a * b);
  }
};
// NaN gives way to any number, as in fmax and fmin.
struct Max {
  template <class T>
  static T of(T a, T b) {
    return a > b || b != b ? a : b;
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return a < b || b != b ? a : b;
  }
};

template <class Op, class T>
METAL_FUNC T combine(T a, T b) {
  if constexpr (vector_of<T>::length == 1) {
    return Op::of(a, b);
  } else {
    typedef typename vector_of<T>::element E;
    T r;
    for (int i = 0; i < vector_of<T>::length; i++) r[i] = Op::of((E)a[i], (E)b[i]);
    return r;
  }
}

// All lanes combined in pairs, then pairs of pairs, like a butterfly of shuffles: by the lane that comes first for all,
// which is no race, as a lane's values are the runtime's to order.
template <class Op, class T>
__attribute__((no_sanitize("thread"))) METAL_FUNC T reduce(Lanes<T> lanes) {
  if (!msl_is_first()) return lanes.values[0];
  for (uint width = 1; width < 32; width *= 2) {
    for (uint i = 0; i < 32; i += 2 * width) {
      if (lanes.has(i + width)) lanes.values[i] = combine<Op>(lanes.values[i], lanes.values[i + width]);
    }
  }
  return lanes.values[0];
}

// The lanes before `end` combined in order, from `start` on.
template <class Op, class T>
METAL_FUNC T prefix(Lanes<T> lanes, T start, uint end) {
  T r = start;
  for (uint i = 0; i < end; i++) {
    if (lanes.has(i)) r = combine<Op>(r, lanes.values[i]);
  }
  return r;
}

// Apple documents its functions for these: no bool, no 64-bit integers, no bfloat.
template <class T, class E = typename vector_of<T>::element>
inline constexpr constant bool is_simd =
    metal::is_arithmetic_v<E> && sizeof(E) <= 4 && !__is_same(E, bfloat) && !__is_same(E, bool);
template <class T>
using Simd = metal::enable_if_t<is_simd<T>, T>;
template <class T>
using SimdInteger = metal::enable_if_t<is_simd<T> && metal::is_integral_v<T>, T>;
}  // namespace msl

namespace metal {
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle(T x, ushort lane, MSL_SITE) {
  return msl::gather(x, site).values[lane & 31];
}
template <class T>
METAL_FUNC msl::Simd<T> simd_broadcast(T x, ushort lane, MSL_SITE) {
  return msl::gather(x, site).values[lane & 31];
}
template <class T>
METAL_FUNC msl::Simd<T> simd_broadcast_first(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.values[__builtin_ctz(lanes.mask)];
}
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle_up(T x, ushort delta, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.at(lanes.own - delta, x);
}
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle_down(T x, ushort delta, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.at(lanes.own + delta, x);
}
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle_xor(T x, ushort mask, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.values[(lanes.own ^ mask) & 31];
}
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle_rotate_up(T x, ushort delta, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.values[(lanes.own - delta) & 31];
}
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle_rotate_down(T x, ushort delta, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.values[(lanes.own + delta) & 31];
}
// What is shifted in comes from the other end of `filling`, in blocks of `modulo` lanes.
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle_and_fill_up(T x, T filling, ushort delta, ushort modulo = 32,
                                                 MSL_SITE) {
  auto lanes = msl::gather(x, site);
  auto fill = msl::gather(filling, site);
  uint block = lanes.own / modulo * modulo;
  uint place = lanes.own - block;
  return place >= delta ? lanes.values[lanes.own - delta]
                        : fill.values[block + (place + modulo - delta) % modulo];
}
template <class T>
METAL_FUNC msl::Simd<T> simd_shuffle_and_fill_down(T x, T filling, ushort delta, ushort modulo = 32,
                                                   MSL_SITE) {
  auto lanes = msl::gather(x, site);
  auto fill = msl::gather(filling, site);
  uint block = lanes.own / modulo * modulo;
  uint place = lanes.own - block;
  return place + delta < modulo ? lanes.values[lanes.own + delta]
                                : fill.values[block + (place + delta) % modulo];
}

template <class T>
METAL_FUNC msl::Simd<T> simd_sum(T x, MSL_SITE) {
  return msl::reduce<msl::Sum>(msl::gather(x, site));
}
template <class T>
METAL_FUNC msl::Simd<T> simd_product(T x, MSL_SITE) {
  return msl::reduce<msl::Product>(msl::gather(x, site));
}
template <class T>
METAL_FUNC msl::Simd<T> simd_max(T x, MSL_SITE) {
  return msl::reduce<msl::Max>(msl::gather(x, site));
}
template <class T>
METAL_FUNC msl::Simd<T> simd_min(T x, MSL_SITE) {
  return msl::reduce<msl::Min>(msl::gather(x, site));
}
template <class T>
METAL_FUNC msl::Simd<T> simd_prefix_inclusive_sum(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return msl::prefix<msl::Sum>(lanes, T(0), lanes.own + 1);
}
template <class T>
METAL_FUNC msl::Simd<T> simd_prefix_exclusive_sum(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return msl::prefix<msl::Sum>(lanes, T(0), lanes.own);
}
template <class T>
METAL_FUNC msl::Simd<T> simd_prefix_inclusive_product(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return msl::prefix<msl::Product>(lanes, T(1), lanes.own + 1);
}
template <class T>
METAL_FUNC msl::Simd<T> simd_prefix_exclusive_product(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return msl::prefix<msl::Product>(lanes, T(1), lanes.own);
}

template <class T>
METAL_FUNC msl::SimdInteger<T> simd_and(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  T r = ~T(0);
  for (uint i = 0; i < 32; i++) r = lanes.has(i) ? r & lanes.values[i] : r;
  return r;
}
template <class T>
METAL_FUNC msl::SimdInteger<T> simd_or(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  T r = 0;
  for (uint i = 0; i < 32; i++) r = lanes.has(i) ? r | lanes.values[i] : r;
  return r;
}
template <class T>
METAL_FUNC msl::SimdInteger<T> simd_xor(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  T r = 0;
  for (uint i = 0; i < 32; i++) r = lanes.has(i) ? r ^ lanes.values[i] : r;
  return r;
}
METAL_FUNC bool simd_all(bool x, MSL_SITE) { return simd_and(x ? 1u : 0u, site) == 1u; }
METAL_FUNC bool simd_any(bool x, MSL_SITE) { return simd_or(x ? 1u : 0u, site) == 1u; }
METAL_FUNC bool simd_is_first(MSL_SITE) {
  auto lanes = msl::gather(0u, site);
  return lanes.own == (uint)__builtin_ctz(lanes.mask);
}

struct simd_vote {
  typedef ulong vote_t;
  ulong bits;
  explicit simd_vote(vote_t votes) : bits(votes) {}
  explicit operator vote_t() const { return bits; }
  bool all() const { return bits == 0xfffffffful; }
  bool any() const { return bits != 0; }
};
METAL_FUNC simd_vote simd_ballot(bool x, MSL_SITE) {
  return simd_vote(simd_or(x ? 1u << msl_lane() : 0u, site));
}

template <class T>
METAL_FUNC msl::Simd<T> quad_sum(T x, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  uint first = lanes.own & ~3u;
  T left = (T)(lanes.values[first] + lanes.values[first + 1]);
  T right = (T)(lanes.values[first + 2] + lanes.values[first + 3]);
  return (T)(left + right);
}
template <class T>
METAL_FUNC msl::Simd<T> quad_shuffle_xor(T x, ushort mask, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.values[(lanes.own & ~3u) | ((lanes.own ^ mask) & 3)];
}
template <class T>
METAL_FUNC msl::Simd<T> quad_broadcast(T x, ushort lane, MSL_SITE) {
  auto lanes = msl::gather(x, site);
  return lanes.values[(lanes.own & ~3u) | (lane & 3)];
}
}  // namespace metal

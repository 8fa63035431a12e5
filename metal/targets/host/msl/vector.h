// Vectors: clang's own, which have Metal's swizzles, operators, sizes and alignments.
#pragma once

namespace metal {
template <class T, int n>
using vec = T __attribute__((ext_vector_type(n)));
template <class T, int n>
using packed_vec = T __attribute__((ext_vector_type(n), aligned(sizeof(T))));
}  // namespace metal

#define MSL_VECTORS(T)                         \
  typedef metal::vec<T, 2> T##2;               \
  typedef metal::vec<T, 3> T##3;               \
  typedef metal::vec<T, 4> T##4;               \
  typedef metal::packed_vec<T, 2> packed_##T##2; \
  typedef metal::packed_vec<T, 4> packed_##T##4;
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)

namespace msl {
// The element type and length of a vector; a scalar is its own one element.
template <class T>
struct vector_of {
  typedef T element;
  static constexpr constant int length = 1;
};
#define MSL_VECTOR_OF(n)                     \
  template <class T>                         \
  struct vector_of<metal::vec<T, n>> {       \
    typedef T element;                       \
    static constexpr constant int length = n; \
  };
MSL_VECTOR_OF(2)
MSL_VECTOR_OF(3)
MSL_VECTOR_OF(4)

template <class V, int at>
METAL_FUNC void fill(thread V&) {
  static_assert(at == vector_of<V>::length, "wrong number of vector components");
}

// Writes the elements of `first`, then of `rest`, to `v` from `at` on.
template <class V, int at, class First, class... Rest>
METAL_FUNC void fill(thread V& v, First first, Rest... rest) {
  typedef typename vector_of<V>::element E;
  constexpr int length = vector_of<First>::length;
  if constexpr (length == 1) {
    v[at] = (E)first;
  } else {
    for (int i = 0; i < length; i++) v[at + i] = (E)first[i];
  }
  fill<V, at + length>(v, rest...);
}

// V(first, rest...) as Metal means it; C++ would reinterpret the bits of one vector as another.
template <class V, class First, class... Rest>
METAL_FUNC V make(First first, Rest... rest) {
  typedef typename vector_of<V>::element E;
  V v;
  if constexpr (sizeof...(Rest) == 0 && vector_of<First>::length == 1) {
    for (int i = 0; i < vector_of<V>::length; i++) v[i] = (E)first;
  } else {
    fill<V, 0>(v, first, rest...);
  }
  return v;
}
template <class V>
METAL_FUNC V make() {
  return V(0);
}

template <class To, class From>
METAL_FUNC To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, from);
}
}  // namespace msl

#define as_type msl::bit_cast

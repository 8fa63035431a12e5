// <metal_atomic>: relaxed only, as in Metal.
#pragma once

namespace metal {
enum memory_order { memory_order_relaxed = 0 };

template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
}  // namespace metal

namespace msl {
// The integer that has T's bits: clang's atomics take no other floats.
template <int size>
struct bits_of_size {
  typedef uint type;
};
template <>
struct bits_of_size<1> {
  typedef uchar type;
};
template <>
struct bits_of_size<2> {
  typedef ushort type;
};
template <>
struct bits_of_size<8> {
  typedef ulong type;
};
template <class T>
using Bits = typename bits_of_size<sizeof(T)>::type;

struct Difference {
  template <class T>
  static T of(T a, T b) {
    return (T)(a - b);
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
}  // namespace msl

namespace metal {
#define MSL_ATOMIC_FETCH(space, name, Op)                                                       \
  template <class T, class V>                                                                   \
  METAL_FUNC T atomic_fetch_##name##_explicit(volatile space atomic<T>* object, V operand,      \
                                              memory_order order) {                             \
    T old = atomic_load_explicit(object, order);                                                \
    while (!atomic_compare_exchange_weak_explicit(object, &old, Op::of(old, (T)operand), order, \
                                                  order)) {                                     \
    }                                                                                           \
    return old;                                                                                 \
  }
#define MSL_ATOMICS(space)                                                                      \
  template <class T>                                                                            \
  METAL_FUNC T atomic_load_explicit(const volatile space atomic<T>* object, memory_order) {     \
    auto bits = __atomic_load_n((const volatile space msl::Bits<T>*)object, __ATOMIC_RELAXED);  \
    return __builtin_bit_cast(T, bits);                                                         \
  }                                                                                             \
  template <class T>                                                                            \
  METAL_FUNC void atomic_store_explicit(volatile space atomic<T>* object,                       \
                                        msl::same<T> desired, memory_order) {                   \
    auto bits = __builtin_bit_cast(msl::Bits<T>, desired);                                      \
    __atomic_store_n((volatile space msl::Bits<T>*)object, bits, __ATOMIC_RELAXED);             \
  }                                                                                             \
  template <class T>                                                                            \
  METAL_FUNC T atomic_exchange_explicit(volatile space atomic<T>* object, msl::same<T> desired, \
                                        memory_order) {                                         \
    auto bits = __builtin_bit_cast(msl::Bits<T>, desired);                                      \
    auto old =                                                                                  \
        __atomic_exchange_n((volatile space msl::Bits<T>*)object, bits, __ATOMIC_RELAXED);      \
    return __builtin_bit_cast(T, old);                                                          \
  }                                                                                             \
  template <class T>                                                                            \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>* object,       \
                                                        thread T* expected, msl::same<T> desired, \
                                                        memory_order, memory_order) {           \
    auto old = __builtin_bit_cast(msl::Bits<T>, *expected);                                     \
    auto bits = __builtin_bit_cast(msl::Bits<T>, desired);                                      \
    bool done = __atomic_compare_exchange_n((volatile space msl::Bits<T>*)object, &old, bits,   \
                                            true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);          \
    *expected = __builtin_bit_cast(T, old);                                                     \
    return done;                                                                                \
  }                                                                                             \
  MSL_ATOMIC_FETCH(space, add, msl::Sum)                                                        \
  MSL_ATOMIC_FETCH(space, sub, msl::Difference)                                                 \
  MSL_ATOMIC_FETCH(space, max, msl::Max)                                                        \
  MSL_ATOMIC_FETCH(space, min, msl::Min)                                                        \
  MSL_ATOMIC_FETCH(space, and, msl::And)                                                        \
  MSL_ATOMIC_FETCH(space, or, msl::Or)                                                          \
  MSL_ATOMIC_FETCH(space, xor, msl::Xor)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
}  // namespace metal

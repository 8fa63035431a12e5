// <metal_type_traits> and <metal_limits>.
#pragma once

#define CHAR_BIT 8
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 0xffffffffu
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define HALF_MAX 0x1.ffcp15h
#define MAXFLOAT FLT_MAX
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f

namespace metal {
template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  constexpr operator T() const { return v; }
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool b, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool b, class T = void>
using enable_if_t = typename enable_if<b, T>::type;

template <bool b, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool b, class T, class F>
using conditional_t = typename conditional<b, T, F>::type;

template <class T>
using remove_cv_t = __remove_cv(T);
template <class T>
struct remove_cv {
  typedef remove_cv_t<T> type;
};
template <class T>
using remove_reference_t = __remove_reference_t(T);
template <class T>
using remove_pointer_t = __remove_pointer(T);
template <class T>
T declval();

template <class A, class B>
inline constexpr constant bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
inline constexpr constant bool is_convertible_v = __is_convertible_to(A, B);
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};

#define MSL_TRAIT(name, condition)                       \
  template <class T>                                     \
  inline constexpr constant bool name##_v = (condition); \
  template <class T>                                     \
  struct name : bool_constant<name##_v<T>> {};
MSL_TRAIT(is_floating_point, __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat))
MSL_TRAIT(is_integral, __is_integral(T))
MSL_TRAIT(is_arithmetic, is_integral_v<T> || is_floating_point_v<T>)
MSL_TRAIT(is_signed, __is_signed(T) || is_floating_point_v<T>)
MSL_TRAIT(is_unsigned, __is_unsigned(T))
MSL_TRAIT(is_pointer, __is_pointer(T))

template <class T>
struct numeric_limits {
  static constexpr constant bool is_specialized = false;
};
#define MSL_INTEGER_LIMITS(T, least, greatest)                  \
  template <>                                                   \
  struct numeric_limits<T> {                                    \
    static constexpr constant bool is_specialized = true;       \
    static constexpr constant bool is_integer = true;           \
    static constexpr constant bool is_signed = (T)-1 < (T)0;    \
    static constexpr T min() { return least; }                  \
    static constexpr T max() { return greatest; }               \
    static constexpr T lowest() { return least; }               \
  };
MSL_INTEGER_LIMITS(bool, false, true)
MSL_INTEGER_LIMITS(char, -128, 127)
MSL_INTEGER_LIMITS(int8_t, -128, 127)
MSL_INTEGER_LIMITS(uchar, 0, 255)
MSL_INTEGER_LIMITS(short, -32768, 32767)
MSL_INTEGER_LIMITS(ushort, 0, 65535)
MSL_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
MSL_INTEGER_LIMITS(uint, 0, UINT_MAX)
MSL_INTEGER_LIMITS(long, -9223372036854775807L - 1, 9223372036854775807L)
MSL_INTEGER_LIMITS(ulong, 0, 18446744073709551615UL)

#define MSL_FLOAT_LIMITS(T, greatest, least, step)                     \
  template <>                                                          \
  struct numeric_limits<T> {                                           \
    static constexpr constant bool is_specialized = true;              \
    static constexpr constant bool is_integer = false;                 \
    static constexpr constant bool is_signed = true;                   \
    static constexpr T min() { return (T)least; }                      \
    static constexpr T max() { return (T)greatest; }                   \
    static constexpr T lowest() { return (T)-greatest; }               \
    static constexpr T epsilon() { return (T)step; }                   \
    static constexpr T infinity() { return (T)__builtin_inff(); }      \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); }   \
  };
MSL_FLOAT_LIMITS(float, FLT_MAX, FLT_MIN, FLT_EPSILON)
MSL_FLOAT_LIMITS(half, 65504.0f, 0x1p-14f, 0x1p-10f)
MSL_FLOAT_LIMITS(bfloat, 0x1.fep127f, FLT_MIN, 0x1p-7f)
}  // namespace metal

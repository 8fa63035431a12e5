// <metal_math>, <metal_common>, <metal_relational> and <metal_geometric>.
//
// Every function is exact to float's last place or so: what Apple's fast versions lose is not imitated. A half is
// computed as a float and rounded once.
#pragma once

namespace metal {
// One function of 1, 2 or 3 arguments, of scalars and then element by element of vectors.
#define MSL_ELEMENTS_1(name, T, n)              \
  METAL_FUNC T##n name(T##n a) {                \
    T##n r;                                     \
    for (int i = 0; i < n; i++) r[i] = name((T)a[i]); \
    return r;                                   \
  }
#define MSL_ELEMENTS_2(name, T, n)                           \
  METAL_FUNC T##n name(T##n a, T##n b) {                     \
    T##n r;                                                  \
    for (int i = 0; i < n; i++) r[i] = name((T)a[i], (T)b[i]); \
    return r;                                                \
  }
#define MSL_ELEMENTS_3(name, T, n)                                      \
  METAL_FUNC T##n name(T##n a, T##n b, T##n c) {                        \
    T##n r;                                                             \
    for (int i = 0; i < n; i++) r[i] = name((T)a[i], (T)b[i], (T)c[i]); \
    return r;                                                           \
  }
#define MSL_VECTORS_1(name, T) \
  MSL_ELEMENTS_1(name, T, 2) MSL_ELEMENTS_1(name, T, 3) MSL_ELEMENTS_1(name, T, 4)
#define MSL_VECTORS_2(name, T) \
  MSL_ELEMENTS_2(name, T, 2) MSL_ELEMENTS_2(name, T, 3) MSL_ELEMENTS_2(name, T, 4)
#define MSL_VECTORS_3(name, T) \
  MSL_ELEMENTS_3(name, T, 2) MSL_ELEMENTS_3(name, T, 3) MSL_ELEMENTS_3(name, T, 4)

#define MSL_FLOATS_1(name, value)                                \
  METAL_FUNC float name(float x) { return value; }               \
  METAL_FUNC half name(half h) {                                 \
    float x = h;                                                 \
    return (half)(value);                                        \
  }                                                              \
  MSL_VECTORS_1(name, float) MSL_VECTORS_1(name, half)
#define MSL_FLOATS_2(name, value)                                \
  METAL_FUNC float name(float x, float y) { return value; }      \
  METAL_FUNC half name(half h, half i) {                         \
    float x = h, y = i;                                          \
    return (half)(value);                                        \
  }                                                              \
  MSL_VECTORS_2(name, float) MSL_VECTORS_2(name, half)
#define MSL_FLOATS_3(name, value)                                     \
  METAL_FUNC float name(float x, float y, float z) { return value; }  \
  METAL_FUNC half name(half h, half i, half j) {                      \
    float x = h, y = i, z = j;                                        \
    return (half)(value);                                             \
  }                                                                   \
  MSL_VECTORS_3(name, float) MSL_VECTORS_3(name, half)

// In metal::, metal::fast:: and metal::precise:: alike.
#define MSL_MATH                                                         \
  MSL_FLOATS_1(abs, __builtin_fabsf(x))                                  \
  MSL_FLOATS_1(acos, __builtin_acosf(x))                                 \
  MSL_FLOATS_1(acosh, __builtin_acoshf(x))                               \
  MSL_FLOATS_1(asin, __builtin_asinf(x))                                 \
  MSL_FLOATS_1(asinh, __builtin_asinhf(x))                               \
  MSL_FLOATS_1(atan, __builtin_atanf(x))                                 \
  MSL_FLOATS_1(atanh, __builtin_atanhf(x))                               \
  MSL_FLOATS_1(ceil, __builtin_ceilf(x))                                 \
  MSL_FLOATS_1(cos, __builtin_cosf(x))                                   \
  MSL_FLOATS_1(cosh, __builtin_coshf(x))                                 \
  MSL_FLOATS_1(cospi, __builtin_cosf(M_PI_F * x))                        \
  MSL_FLOATS_1(exp, __builtin_expf(x))                                   \
  MSL_FLOATS_1(exp2, __builtin_exp2f(x))                                 \
  MSL_FLOATS_1(exp10, __builtin_powf(10.0f, x))                          \
  MSL_FLOATS_1(fabs, __builtin_fabsf(x))                                 \
  MSL_FLOATS_1(floor, __builtin_floorf(x))                               \
  MSL_FLOATS_1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f)) \
  MSL_FLOATS_1(log, __builtin_logf(x))                                   \
  MSL_FLOATS_1(log2, __builtin_log2f(x))                                 \
  MSL_FLOATS_1(log10, __builtin_log10f(x))                               \
  MSL_FLOATS_1(rint, __builtin_rintf(x))                                 \
  MSL_FLOATS_1(round, __builtin_roundf(x))                               \
  MSL_FLOATS_1(rsqrt, 1.0f / __builtin_sqrtf(x))                         \
  MSL_FLOATS_1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f)) \
  MSL_FLOATS_1(sin, __builtin_sinf(x))                                   \
  MSL_FLOATS_1(sinh, __builtin_sinhf(x))                                 \
  MSL_FLOATS_1(sinpi, __builtin_sinf(M_PI_F * x))                        \
  MSL_FLOATS_1(sqrt, __builtin_sqrtf(x))                                 \
  MSL_FLOATS_1(tan, __builtin_tanf(x))                                   \
  MSL_FLOATS_1(tanh, __builtin_tanhf(x))                                 \
  MSL_FLOATS_1(tanpi, __builtin_tanf(M_PI_F * x))                        \
  MSL_FLOATS_1(trunc, __builtin_truncf(x))                               \
  MSL_FLOATS_2(atan2, __builtin_atan2f(x, y))                            \
  MSL_FLOATS_2(divide, x / y)                                            \
  MSL_FLOATS_2(fdim, __builtin_fdimf(x, y))                              \
  MSL_FLOATS_2(fmax, __builtin_fmaxf(x, y))                              \
  MSL_FLOATS_2(fmin, __builtin_fminf(x, y))                              \
  MSL_FLOATS_2(fmod, __builtin_fmodf(x, y))                              \
  MSL_FLOATS_2(max, __builtin_fmaxf(x, y))                               \
  MSL_FLOATS_2(min, __builtin_fminf(x, y))                               \
  MSL_FLOATS_2(pow, __builtin_powf(x, y))                                \
  MSL_FLOATS_2(powr, __builtin_powf(x, y))                               \
  MSL_FLOATS_3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))         \
  MSL_FLOATS_3(fma, __builtin_fmaf(x, y, z))                             \
  MSL_FLOATS_3(max3, __builtin_fmaxf(x, __builtin_fmaxf(y, z)))          \
  MSL_FLOATS_3(min3, __builtin_fminf(x, __builtin_fminf(y, z)))
MSL_MATH
namespace fast {
MSL_MATH
}
namespace precise {
MSL_MATH
}

MSL_FLOATS_1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f)
MSL_FLOATS_2(copysign, __builtin_copysignf(x, y))
MSL_FLOATS_2(nextafter, __builtin_nextafterf(x, y))
MSL_FLOATS_2(step, y < x ? 0.0f : 1.0f)
MSL_FLOATS_3(mix, x + (y - x) * z)

METAL_FUNC float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
METAL_FUNC half ldexp(half x, int k) { return (half)__builtin_ldexpf((float)x, k); }
METAL_FUNC int ilogb(float x) { return __builtin_ilogbf(x); }
METAL_FUNC float frexp(float x, thread int& exponent) { return __builtin_frexpf(x, &exponent); }
METAL_FUNC float modf(float x, thread float& whole) {
  whole = __builtin_truncf(x);
  return x - whole;
}
METAL_FUNC float sincos(float x, thread float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}

#define MSL_PREDICATE(name, value)                                              \
  template <class T>                                                            \
  METAL_FUNC enable_if_t<is_floating_point_v<T>, bool> name(T x) {              \
    return value;                                                               \
  }
MSL_PREDICATE(isnan, x != x)
MSL_PREDICATE(isinf, __builtin_isinf((float)x))
MSL_PREDICATE(isfinite, __builtin_isfinite((float)x))
MSL_PREDICATE(signbit, __builtin_signbit((float)x))

template <class T>
METAL_FUNC T select(T a, T b, bool second) {
  return second ? b : a;
}
// What comparing vectors yields is a vector of integers as wide as their elements.
#define MSL_SELECT(T, n, Mask)                                   \
  METAL_FUNC T##n select(T##n a, T##n b, Mask##n second) {       \
    T##n r;                                                      \
    for (int i = 0; i < n; i++) r[i] = second[i] ? b[i] : a[i];  \
    return r;                                                    \
  }
#define MSL_ANY_ALL(T, n)                                 \
  METAL_FUNC bool any(T##n c) {                           \
    bool r = false;                                       \
    for (int i = 0; i < n; i++) r = r || c[i];            \
    return r;                                             \
  }                                                       \
  METAL_FUNC bool all(T##n c) {                           \
    bool r = true;                                        \
    for (int i = 0; i < n; i++) r = r && c[i];            \
    return r;                                             \
  }
#define MSL_DOT(T, n)                                                                  \
  METAL_FUNC T dot(T##n a, T##n b) {                                                   \
    T r = 0;                                                                           \
    for (int i = 0; i < n; i++) r += a[i] * b[i];                                      \
    return r;                                                                          \
  }                                                                                    \
  METAL_FUNC T length_squared(T##n a) { return dot(a, a); }                            \
  METAL_FUNC T length(T##n a) { return (T)__builtin_sqrtf((float)dot(a, a)); }         \
  METAL_FUNC T distance(T##n a, T##n b) { return length(a - b); }                      \
  METAL_FUNC T##n normalize(T##n a) { return a / length(a); }
#define MSL_LENGTH(n)                                                                  \
  MSL_SELECT(float, n, int)                                                            \
  MSL_SELECT(int, n, int)                                                              \
  MSL_SELECT(uint, n, int)                                                             \
  MSL_SELECT(half, n, short)                                                           \
  MSL_ANY_ALL(int, n)                                                                  \
  MSL_ANY_ALL(short, n)                                                                \
  MSL_DOT(float, n)                                                                    \
  MSL_DOT(half, n)
MSL_LENGTH(2)
MSL_LENGTH(3)
MSL_LENGTH(4)
}  // namespace metal

// What the kernels' own words mean to Apple's compiler. A host that acts it out defines some before it reads this.
#ifndef THREADGROUP_ARRAY

// Declares an array that a threadgroup shares: THREADGROUP_ARRAY(float, tile, [16][33]);
#define THREADGROUP_ARRAY(T, name, extents) threadgroup T name extents

// The same, for the only one of a kernel, which on NVIDIA's GPUs may be larger than 48 KB.
#define LARGE_THREADGROUP_ARRAY(T, name, extents) THREADGROUP_ARRAY(T, name, extents)

// Makes a vector whose element type is a template parameter: MAKE_VEC(T, 4)(a, b, c, d).
// Where the type is known, float4(a, b, c, d) does.
#define MAKE_VEC(T, n) metal::vec<T, n>

// Before a loop of a constant number of rounds over an array that must stay in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

#endif

// An input that the kernel writes where it lies, though MLX declares it const.
#define WRITTEN(T, name) ((device T*)(name))

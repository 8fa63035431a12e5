// The words that MSL itself lacks and every target defines.

// An array shared by the threads of a group: THREADGROUP_ARRAY(float, partial, [32]);
#ifndef THREADGROUP_ARRAY
#define THREADGROUP_ARRAY(type, name, extents) threadgroup type name extents
#endif

// Before a loop of a constant number of rounds over an array that must stay in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

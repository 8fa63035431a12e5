// What a compiled kernel and the runtime know of each other. Both sides include this, so it includes nothing.
#pragma once

// As Metal's uint3 lies in memory.
struct MslUint3 {
  unsigned x, y, z, padding;
};

// What one thread may ask about itself; the names are Metal's attributes.
struct MslIds {
  MslUint3 thread_position_in_grid;
  MslUint3 thread_position_in_threadgroup;
  MslUint3 threadgroup_position_in_grid;
  MslUint3 threads_per_threadgroup;
  MslUint3 dispatch_threads_per_threadgroup;
  MslUint3 threadgroups_per_grid;
  MslUint3 threads_per_grid;
  MslUint3 grid_size;
  MslUint3 grid_origin;
  unsigned thread_index_in_threadgroup;
  unsigned thread_index_in_simdgroup;
  unsigned thread_index_in_quadgroup;
  unsigned simdgroup_index_in_threadgroup;
  unsigned quadgroup_index_in_threadgroup;
  unsigned simdgroups_per_threadgroup;
  unsigned quadgroups_per_threadgroup;
  unsigned dispatch_simdgroups_per_threadgroup;
  unsigned dispatch_quadgroups_per_threadgroup;
  unsigned threads_per_simdgroup;
  unsigned thread_execution_width;
};

// Runs the kernel as one thread; the function `msl_entry`, written after each kernel's text. `buffers` are addresses.
typedef void (*MslEntry)(const unsigned long* buffers, const MslIds* ids);

// counts[v] = how many elements of x are v, modulo 16.
//
// x [N] uint; counts [16] uint, atomic, zero before. One thread an element, groups of at least 16 threads.
// 64 bytes of threadgroup memory.

// ---- body ----
THREADGROUP_ARRAY(atomic_uint, bins, [16]);
const uint place = thread_position_in_threadgroup.x;
if (place < 16) {
  atomic_store_explicit(&bins[place], 0u, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
atomic_fetch_add_explicit(&bins[x[thread_position_in_grid.x] & 15], 1u, memory_order_relaxed);
threadgroup_barrier(mem_flags::mem_threadgroup);
if (place < 16) {
  const uint count = atomic_load_explicit(&bins[place], memory_order_relaxed);
  atomic_fetch_add_explicit(&counts[place], count, memory_order_relaxed);
}

// Rows shared out over threads: one row to a group of SIMDS simdgroups, or where one simdgroup is enough, one row to each
// simdgroup of a group. A thread holds every (32 * SIMDS)-th chunk of its row.

// Which row, and which of the threads that share it.
struct Place {
  uint row;
  uint thread_in_row;
};

template <int SIMDS>
METAL_FUNC Place place_of(uint group, uint simdgroup, uint simdgroups, uint lane) {
  Place place;
  place.row = SIMDS == 1 ? group * simdgroups + simdgroup : group;
  place.thread_in_row = SIMDS == 1 ? lane : simdgroup * 32 + lane;
  return place;
}

// The sum over all threads of a row, in each of them. `partial` holds SIMDS numbers, and none is touched where SIMDS is 1.
template <int SIMDS>
METAL_FUNC float row_sum(float value, threadgroup float* partial, uint simdgroup, uint lane) {
  value = simd_sum(value);
  if (SIMDS == 1) return value;
  threadgroup_barrier(mem_flags::mem_threadgroup);  // until all have read an earlier sum
  if (lane == 0) partial[simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < uint(SIMDS) ? partial[lane] : 0.0f);
}

// Two sums at once, for half the barriers.
template <int SIMDS>
METAL_FUNC void row_sums(
    thread float& first,
    thread float& second,
    threadgroup float* firsts,
    threadgroup float* seconds,
    uint simdgroup,
    uint lane) {
  first = simd_sum(first);
  second = simd_sum(second);
  if (SIMDS == 1) return;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    firsts[simdgroup] = first;
    seconds[simdgroup] = second;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  first = simd_sum(lane < uint(SIMDS) ? firsts[lane] : 0.0f);
  second = simd_sum(lane < uint(SIMDS) ? seconds[lane] : 0.0f);
}

// The largest value of all threads of a row, in each of them.
template <int SIMDS>
METAL_FUNC float row_max(float value, threadgroup float* partial, uint simdgroup, uint lane) {
  value = simd_max(value);
  if (SIMDS == 1) return value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) partial[simdgroup] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_max(lane < uint(SIMDS) ? partial[lane] : -INFINITY);
}

// Rows shared out over threads: one row to a group of SIMDS simdgroups, or where one simdgroup is enough, one row to each
// LANES lanes of a group. A thread holds every (LANES * SIMDS)-th chunk of its row.

// Which row, and which of the threads that share it.
struct Place {
  uint row;
  uint thread_in_row;
};

template <int SIMDS, int LANES = 32>
METAL_FUNC Place place_of(uint group, uint simdgroup, uint simdgroups, uint lane) {
  Place place;
  place.row = SIMDS == 1 ? (group * simdgroups + simdgroup) * (32 / LANES) + lane / LANES : group;
  place.thread_in_row = SIMDS == 1 ? lane % LANES : simdgroup * 32 + lane;
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

// The sum over each LANES lanes, in each of them.
template <int LANES>
METAL_FUNC float lanes_sum(float value) {
  if (LANES == 32) return simd_sum(value);
  for (ushort mask = LANES / 2; mask > 0; mask /= 2) value += simd_shuffle_xor(value, mask);
  return value;
}

// COUNT sums at once over all threads of a row, in each of them, at the cost of one barrier.
//
// `partial` holds COUNT * SIMDS numbers. Nothing here waits until all have read the sums before these, so two calls
// between which there is no other barrier take different arrays.
template <int SIMDS, int LANES, int COUNT>
METAL_FUNC void row_sums(
    thread float (&values)[COUNT], threadgroup float* partial, uint simdgroup, uint lane) {
  UNROLL
  for (int i = 0; i < COUNT; i++) values[i] = lanes_sum<LANES>(values[i]);
  if (SIMDS == 1) return;
  for (int i = 0; i < COUNT; i++) {
    if (lane == 0) partial[i * SIMDS + simdgroup] = values[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int i = 0; i < COUNT; i++) {
    values[i] = simd_sum(lane < uint(SIMDS) ? partial[i * SIMDS + lane] : 0.0f);
  }
}

// y[r, c] = sum over d <= c of x[r, d], in float.
//
// x [R, C] float; y [R, C] float. One group a row, any number of threads that is a multiple of 32.
// 132 bytes of threadgroup memory.

inline float lane_scan(float value, uint lane) {
  for (ushort distance = 1; distance < 32; distance *= 2) {
    float left = simd_shuffle_up(value, distance);
    value += lane >= distance ? left : 0.0f;
  }
  return value;
}

// ---- body ----
THREADGROUP_ARRAY(float, sums, [32]);
THREADGROUP_ARRAY(float, carry, [1]);
const uint length = x_shape[1];
const uint row = threadgroup_position_in_grid.y;
const uint width = threads_per_threadgroup.x;
const uint place = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;

if (place == 0) {
  carry[0] = 0;
}
for (uint start = 0; start < length; start += width) {
  const uint c = start + place;
  float value = lane_scan(c < length ? x[size_t(row) * length + c] : 0.0f, lane);
  if (lane == 31) {
    sums[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    sums[lane] = lane_scan(lane < simdgroups_per_threadgroup ? sums[lane] : 0.0f, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  value += carry[0] + (simdgroup > 0 ? sums[simdgroup - 1] : 0.0f);
  if (c < length) {
    y[size_t(row) * length + c] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (place == width - 1) {
    carry[0] = value;
  }
}

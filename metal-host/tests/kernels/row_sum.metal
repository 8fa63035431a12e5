// y[r] = sum over c of x[r, c], in float.
//
// x [R, C] T, C >= 1; y [R] T. One group a row, any number of threads that is a multiple of 32.
// 128 bytes of threadgroup memory.

template <typename P>
float lane_sum(P row, uint length, uint first, uint step) {
  float sum = 0;
  for (uint c = first; c < length; c += step) {
    sum += static_cast<float>(row[c]);
  }
  return sum;
}

// ---- body ----
THREADGROUP_ARRAY(float, partial, [32]);
const uint row = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint length = x_shape[1];

float sum = lane_sum(
    x + size_t(row) * length, length, thread_position_in_threadgroup.x, threads_per_threadgroup.x);
sum = simd_sum(sum);
if (simdgroup == 0) {
  partial[lane] = 0;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (lane == 0) {
  partial[simdgroup] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simdgroup == 0) {
  sum = simd_sum(partial[lane]);
  if (lane == 0) {
    y[row] = static_cast<T>(sum);
  }
}

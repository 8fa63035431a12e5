// c = a b, in float.
//
// a [M, K] T, b [K, N] T; c [M, N] T. One group of 128 threads for each 32 by 32 tile of c: four simdgroups with
// 16 by 16 each. 12 KiB of threadgroup memory for float, 8 KiB for half.

template <typename T, typename P>
void stage(threadgroup T* tile, P source, uint2 first, uint2 size, uint thread_index) {
  for (uint e = thread_index; e < 32 * 32; e += 128) {
    const uint2 at = first + uint2(e / 32, e % 32);
    const bool inside = at.x < size.x && at.y < size.y;
    tile[e] = inside ? source[size_t(at.x) * size.y + at.y] : T(0);
  }
}

// ---- body ----
THREADGROUP_ARRAY(T, a_tile, [32 * 32]);
THREADGROUP_ARRAY(T, b_tile, [32 * 32]);
THREADGROUP_ARRAY(float, c_tile, [32 * 32]);
const uint2 a_size = uint2(a_shape[0], a_shape[1]);
const uint2 b_size = uint2(b_shape[0], b_shape[1]);
const uint2 first = 32 * threadgroup_position_in_grid.yx;
const uint row = simdgroup_index_in_threadgroup / 2 * 16;
const uint column = simdgroup_index_in_threadgroup % 2 * 16;

simdgroup_matrix<float, 8, 8> sums[2][2];
for (uint i = 0; i < 4; i++) {
  sums[i / 2][i % 2] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
for (uint k = 0; k < a_size.y; k += 32) {
  stage(a_tile, a, uint2(first.x, k), a_size, thread_index_in_threadgroup);
  stage(b_tile, b, uint2(k, first.y), b_size, thread_index_in_threadgroup);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < 32; j += 8) {
    simdgroup_matrix<T, 8, 8> left[2];
    simdgroup_matrix<T, 8, 8> right[2];
    for (uint i = 0; i < 2; i++) {
      simdgroup_load(left[i], a_tile + (row + 8 * i) * 32 + j, 32);
      simdgroup_load(right[i], b_tile + j * 32 + column + 8 * i, 32);
    }
    for (uint i = 0; i < 4; i++) {
      simdgroup_multiply_accumulate(sums[i / 2][i % 2], left[i / 2], right[i % 2], sums[i / 2][i % 2]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (uint i = 0; i < 4; i++) {
  simdgroup_store(sums[i / 2][i % 2], c_tile + (row + i / 2 * 8) * 32 + column + i % 2 * 8, 32);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint e = thread_index_in_threadgroup; e < 32 * 32; e += 128) {
  const uint2 at = first + uint2(e / 32, e % 32);
  if (at.x < a_size.x && at.y < b_size.y) {
    c[size_t(at.x) * b_size.y + at.y] = static_cast<T>(c_tile[e]);
  }
}

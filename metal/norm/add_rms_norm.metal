// Residual addition and root-mean-square normalization in one pass over memory.
//
//   sum = x + residual                      [N, D] of T, rounded to T, as a separate addition would
//   y   = sum / sqrt(mean(sum²) + EPS) · w  [N, D] of T, the mean in f32
//
// x, residual: [N, D] of T; weight: [D] of W, w = weight, or 1 + weight where UNIT_OFFSET.
// EPS: bits of a float. A thread holds CHUNKS chunks of its row in registers.
// Grid: a group of SIMDS simdgroups a row; with SIMDS = 1, a row for each LANES lanes. Threadgroup memory: 64 bytes.
// Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

// ---- body ----
THREADGROUP_ARRAY(float, partial, [16]);
constexpr int THREADS = SIMDS * LANES;
const uint length = x_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Place place = place_of<SIMDS, LANES>(
    threadgroup_position_in_grid.x, simdgroup, simdgroups_per_threadgroup, lane);
const uint thread_in_row = place.thread_in_row;
const size_t offset = size_t(place.row) * length;
const uint end = SIMDS > 1 || place.row < uint(x_shape[0]) ? length : 0;

Chunk<T> held[CHUNKS];
Chunk<T> added[CHUNKS];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = first_of<T, THREADS>(c, thread_in_row);
  held[c] = read_chunk<T>(x + offset, first, end);
  added[c] = read_chunk<T>(residual + offset, first, end);
}
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < Chunk<T>::SIZE; i++) {
    held[c].values[i] = T(float(held[c].values[i]) + float(added[c].values[i]));
  }
  write_chunk<T>(sum + offset, first_of<T, THREADS>(c, thread_in_row), end, held[c]);
}
rms_normalize<SIMDS, LANES, true, UNIT_OFFSET, W>(
    y + offset, held, weight, thread_in_row, length, end, as_type<float>(EPS), partial, simdgroup, lane);

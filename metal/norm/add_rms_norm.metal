// Residual addition and root-mean-square normalization in one pass over memory.
//
//   sum = x + residual                      [N, D] of T, rounded to T, as a separate addition would
//   y   = sum / sqrt(mean(sum²) + EPS) · w  [N, D] of T, the mean in f32
//
// x, residual: [N, D] of T; weight: [D] of W, w = weight, or 1 + weight where UNIT_OFFSET.
// EPS: bits of a float. A thread keeps CHUNKS chunks of its row in registers.
// Grid: a group of SIMDS simdgroups a row; with SIMDS = 1, a row a simdgroup. Threadgroup memory: 128 bytes.
// Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

// ---- body ----
THREADGROUP_ARRAY(float, partial, [32]);
constexpr int SIZE = Chunk<T>::SIZE;
const uint rows = x_shape[0];
const uint length = x_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Place place = place_of<SIMDS>(
    threadgroup_position_in_grid.x, simdgroup, simdgroups_per_threadgroup, lane);
if (place.row >= rows) return;
const size_t offset = size_t(place.row) * length;

Chunk<T> kept[CHUNKS];
Chunk<T> added[CHUNKS];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = (c * SIMDS * 32 + place.thread_in_row) * SIZE;
  kept[c] = read_chunk<T>(x + offset, first, length);
  added[c] = read_chunk<T>(residual + offset, first, length);
}
float squares = 0.0f;
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = (c * SIMDS * 32 + place.thread_in_row) * SIZE;
  for (int i = 0; i < SIZE; i++) {
    kept[c].values[i] = T(float(kept[c].values[i]) + float(added[c].values[i]));
    squares += float(kept[c].values[i]) * float(kept[c].values[i]);
  }
  write_chunk<T>(sum + offset, first, length, kept[c]);
}
squares = row_sum<SIMDS>(squares, partial, simdgroup, lane);
const float scale = metal::rsqrt(squares / float(length) + as_type<float>(EPS));

UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = (c * SIMDS * 32 + place.thread_in_row) * SIZE;
  float w[SIZE];
  read_floats<W, SIZE>(weight, first, length, w);
  for (int i = 0; i < SIZE; i++) {
    kept[c].values[i] = T(float(kept[c].values[i]) * scale * (UNIT_OFFSET ? 1.0f + w[i] : w[i]));
  }
  write_chunk<T>(y + offset, first, length, kept[c]);
}

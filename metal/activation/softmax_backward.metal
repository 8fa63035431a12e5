// The gradient of softmax over the last axis.
//
//   dx = SCALE · y · (dy - sum(y · dy))      [N, D] of T, the sum in f32
//
// y, dy: [N, D] of T. SCALE: bits of a float.
// A thread keeps CHUNKS chunks of y and of dy in registers. Where TILED, they are one tile of several, and rows are
// read twice. Grid: a group of SIMDS simdgroups a row; with SIMDS = 1, a row a simdgroup. Threadgroup memory: 128 bytes.

// ---- body ----
THREADGROUP_ARRAY(float, partial, [32]);
constexpr int SIZE = Chunk<T>::SIZE;
const uint rows = y_shape[0];
const uint length = y_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Place place = place_of<SIMDS>(
    threadgroup_position_in_grid.x, simdgroup, simdgroups_per_threadgroup, lane);
if (place.row >= rows) return;
const size_t offset = size_t(place.row) * length;
const uint own = place.thread_in_row * SIZE;
const uint step = SIMDS * 32 * SIZE;
const uint end = TILED ? length : 1;

Chunk<T> weights[CHUNKS];
Chunk<T> gradients[CHUNKS];
float dot = 0.0f;
for (uint start = 0; start < end; start += CHUNKS * step) {
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = start + c * step + own;
    weights[c] = read_chunk<T>(y + offset, first, length);
    gradients[c] = read_chunk<T>(dy + offset, first, length);
  }
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      dot += float(weights[c].values[i]) * float(gradients[c].values[i]);
    }
  }
}
dot = row_sum<SIMDS>(dot, partial, simdgroup, lane);

for (uint start = 0; start < end; start += CHUNKS * step) {
  if (TILED) {
    UNROLL
    for (int c = 0; c < CHUNKS; c++) {
      const uint first = start + c * step + own;
      weights[c] = read_chunk<T>(y + offset, first, length);
      gradients[c] = read_chunk<T>(dy + offset, first, length);
    }
  }
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      const float weight = as_type<float>(SCALE) * float(weights[c].values[i]);
      weights[c].values[i] = T(weight * (float(gradients[c].values[i]) - dot));
    }
    write_chunk<T>(dx + offset, start + c * step + own, length, weights[c]);
  }
}

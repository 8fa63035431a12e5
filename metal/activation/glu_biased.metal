// A gated linear unit with biases.
//
//   y = activation(gate + gate_bias) · (up + up_bias)      [N, F] of T, in f32, rounded once
//
// gate, up: [N, F] of T; gate_bias: [F] of G; up_bias: [F] of U. KIND: which activation, as numbered in curve.metal.
// Worker k of R takes rows k, k + R, ..., ROWS of them at once; a thread has one chunk of columns and keeps its biases.
// Grid: x covers the chunks of a row, y the workers. Threadgroup memory: none.

// ---- body ----
constexpr int SIZE = Chunk<T>::SIZE;
const uint rows = gate_shape[0];
const uint length = gate_shape[1];
const uint3 group = threads_per_threadgroup;
const uint first =
    (threadgroup_position_in_grid.x * group.x + thread_position_in_threadgroup.x) * SIZE;
const uint worker = threadgroup_position_in_grid.y * group.y + thread_position_in_threadgroup.y;
const uint workers = threadgroups_per_grid.y * group.y;
if (first >= length) return;

float gate_offset[SIZE];
float up_offset[SIZE];
read_floats<G, SIZE>(gate_bias, first, length, gate_offset);
read_floats<U, SIZE>(up_bias, first, length, up_offset);

for (uint row = worker; row < rows; row += ROWS * workers) {
  Chunk<T> gates[ROWS];
  Chunk<T> ups[ROWS];
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    const uint at = row + r * workers < rows ? row + r * workers : row;
    gates[r] = read_chunk<T>(gate + size_t(at) * length, first, length);
    ups[r] = read_chunk<T>(up + size_t(at) * length, first, length);
  }
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    const uint at = row + r * workers;
    if (at >= rows) continue;
    for (int i = 0; i < SIZE; i++) {
      const Curve open = curve_at<KIND>(float(gates[r].values[i]) + gate_offset[i]);
      gates[r].values[i] = T(open.value * (float(ups[r].values[i]) + up_offset[i]));
    }
    write_chunk<T>(y + size_t(at) * length, first, length, gates[r]);
  }
}

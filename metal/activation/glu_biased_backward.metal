// The gradient of a gated linear unit with biases.
//
//   dgate      = dy · (up + up_bias) · activation'(gate + gate_bias)      [N, F] of T
//   dup        = dy · activation(gate + gate_bias)                        [N, F] of T
//   dgate_bias, dup_bias: the same, added up over the rows of a worker    [R, F] of float
//
// gate, up, dy: [N, F] of T; gate_bias: [F] of G; up_bias: [F] of U. KIND: which activation, as numbered in curve.metal.
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
float gate_sum[SIZE];
float up_sum[SIZE];
read_floats<G, SIZE>(gate_bias, first, length, gate_offset);
read_floats<U, SIZE>(up_bias, first, length, up_offset);
for (int i = 0; i < SIZE; i++) {
  gate_sum[i] = 0.0f;
  up_sum[i] = 0.0f;
}

for (uint row = worker; row < rows; row += ROWS * workers) {
  Chunk<T> gates[ROWS];
  Chunk<T> ups[ROWS];
  Chunk<T> gradients[ROWS];
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    const uint at = row + r * workers < rows ? row + r * workers : row;
    gates[r] = read_chunk<T>(gate + size_t(at) * length, first, length);
    ups[r] = read_chunk<T>(up + size_t(at) * length, first, length);
    gradients[r] = read_chunk<T>(dy + size_t(at) * length, first, length);
  }
  UNROLL
  for (int r = 0; r < ROWS; r++) {
    const uint at = row + r * workers;
    if (at >= rows) continue;
    for (int i = 0; i < SIZE; i++) {
      const Curve open = curve_at<KIND>(float(gates[r].values[i]) + gate_offset[i]);
      const float gradient = float(gradients[r].values[i]);
      const float of_gate = gradient * (float(ups[r].values[i]) + up_offset[i]) * open.slope;
      const float of_up = gradient * open.value;
      gate_sum[i] += of_gate;
      up_sum[i] += of_up;
      gates[r].values[i] = T(of_gate);
      ups[r].values[i] = T(of_up);
    }
    write_chunk<T>(dgate + size_t(at) * length, first, length, gates[r]);
    write_chunk<T>(dup + size_t(at) * length, first, length, ups[r]);
  }
}

for (int i = 0; i < SIZE; i++) {
  if (first + i >= length) break;
  dgate_bias[size_t(worker) * length + first + i] = gate_sum[i];
  dup_bias[size_t(worker) * length + first + i] = up_sum[i];
}

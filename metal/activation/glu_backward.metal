// The gradient of a gated linear unit.
//
//   dgate = dy · up · activation'(gate)      [N] of T
//   dup   = dy · activation(gate)            [N] of T
//
// gate, up, dy: [N] of T. KIND: which activation, as numbered in curve.metal. A thread has CHUNKS chunks of each.
// Grid: groups of any size, for all chunks together. Threadgroup memory: none.

// ---- body ----
constexpr int SIZE = Chunk<T>::SIZE;
const uint length = gate_shape[0];
const uint step = threads_per_threadgroup.x * SIZE;
const uint start =
    threadgroup_position_in_grid.x * CHUNKS * step + thread_position_in_threadgroup.x * SIZE;

Chunk<T> gates[CHUNKS];
Chunk<T> ups[CHUNKS];
Chunk<T> gradients[CHUNKS];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  gates[c] = read_chunk<T>(gate, start + c * step, length);
  ups[c] = read_chunk<T>(up, start + c * step, length);
  gradients[c] = read_chunk<T>(dy, start + c * step, length);
}
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < SIZE; i++) {
    const Curve open = curve_at<KIND>(float(gates[c].values[i]));
    const float gradient = float(gradients[c].values[i]);
    gates[c].values[i] = T(gradient * float(ups[c].values[i]) * open.slope);
    ups[c].values[i] = T(gradient * open.value);
  }
  write_chunk<T>(dgate, start + c * step, length, gates[c]);
  write_chunk<T>(dup, start + c * step, length, ups[c]);
}

// A gated linear unit.
//
//   y = activation(gate) · up      [N] of T, in f32, rounded once
//
// gate, up: [N] of T. KIND: which activation, as numbered in curve.metal. A thread has CHUNKS chunks of each.
// Grid: groups of any size, for all chunks together. Threadgroup memory: none.
// Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).

// ---- body ----
constexpr int SIZE = Chunk<T>::SIZE;
const uint length = gate_shape[0];
const uint step = threads_per_threadgroup.x * SIZE;
const uint start =
    threadgroup_position_in_grid.x * CHUNKS * step + thread_position_in_threadgroup.x * SIZE;

Chunk<T> gates[CHUNKS];
Chunk<T> ups[CHUNKS];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  gates[c] = read_chunk<T>(gate, start + c * step, length);
  ups[c] = read_chunk<T>(up, start + c * step, length);
}
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < SIZE; i++) {
    const Curve open = curve_at<KIND>(float(gates[c].values[i]));
    gates[c].values[i] = T(open.value * float(ups[c].values[i]));
  }
  write_chunk<T>(y, start + c * step, length, gates[c]);
}

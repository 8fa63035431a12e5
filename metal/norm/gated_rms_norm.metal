// Root-mean-square normalization within groups, gated before it or after.
//
//   y = u / sqrt(mean(u²) + EPS) · weight, u = x · silu(gate)   where GATE_FIRST
//   y = x / sqrt(mean(x²) + EPS) · weight · silu(gate)          where not
//
// x, gate: [N, K, D] of T; weight: [K, D] of W; y: [N, K, D] of T. The mean is over the last axis; all is in f32, and
// rounded once. EPS: bits of a float. A thread holds CHUNKS chunks of its row in registers.
// Grid: along x a group of SIMDS simdgroups a row, or with SIMDS = 1 a row for each LANES lanes; along y the K groups.
// Threadgroup memory: 64 bytes.
// Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467); Dao and Gu, Transformers are SSMs,
// 2024 (arXiv:2405.21060).

// ---- body ----
THREADGROUP_ARRAY(float, partial, [16]);
constexpr int THREADS = SIMDS * LANES;
constexpr int SIZE = Chunk<T>::SIZE;
const uint length = x_shape[2];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.y;
const Place place = place_of<SIMDS, LANES>(
    threadgroup_position_in_grid.x, simdgroup, simdgroups_per_threadgroup, lane);
const uint thread_in_row = place.thread_in_row;
const size_t offset = (size_t(place.row) * uint(x_shape[1]) + group) * length;
// A row beyond the last is as good as empty.
const uint end = SIMDS > 1 || place.row < uint(x_shape[0]) ? length : 0;

Chunk<T> held[CHUNKS];
Chunk<T> gates[CHUNKS];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = first_of<T, THREADS>(c, thread_in_row);
  held[c] = read_chunk<T>(x + offset, first, end);
  gates[c] = read_chunk<T>(gate + offset, first, end);
}

float values[CHUNKS][SIZE];
float squares[1] = {0.0f};
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < SIZE; i++) {
    const float z = float(gates[c].values[i]);
    const float xi = float(held[c].values[i]);
    const float u = GATE_FIRST ? xi * (z * sigmoid_of(z).value) : xi;
    squares[0] += u * u;
    // What is still to be scaled by the norm.
    values[c][i] = GATE_FIRST ? u : xi * (z * sigmoid_of(z).value);
  }
}
row_sums<SIMDS, LANES>(squares, partial, simdgroup, lane);
const float scale = metal::rsqrt(squares[0] / float(length) + as_type<float>(EPS));
// Last, out of a cache: what waits for the sum should hold few registers.
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = first_of<T, THREADS>(c, thread_in_row);
  float weights[SIZE];
  read_floats<W, SIZE>(weight + size_t(group) * length, first, length, weights);
  for (int i = 0; i < SIZE; i++) {
    held[c].values[i] = T(values[c][i] * scale * weights[i]);
  }
  write_chunk<T>(y + offset, first, end, held[c]);
}

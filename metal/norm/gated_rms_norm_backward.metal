// The gradient of gated root-mean-square normalization.
//
//   s = silu(gate);   where GATE_FIRST  u = x · s, g = dy;   where not  u = x, g = dy · s
//   r       = 1 / sqrt(mean(u²) + EPS)
//   du      = r · (weight · g - u · r² · mean(weight · g · u))
//   dx      = du · s                           or du                      [N, K, D] of T
//   dgate   = silu'(gate) · du · x             or · dy · u · r · weight   [N, K, D] of T
//   dweight = g · u · r, added up over the rows of one worker             [R, K, D] of float
//
// x, gate, dy: [N, K, D] of T; weight: [K, D] of W. EPS: bits of a float.
// Worker k of R takes rows k, k + R, ... of one of the K groups; a thread holds CHUNKS chunks of a row in registers.
// Grid: along x a group of SIMDS simdgroups a worker, or with SIMDS = 1 a worker for each LANES lanes; along y the K
// groups. Threadgroup memory: 256 bytes.

// ---- body ----
THREADGROUP_ARRAY(float, partial, [2][32]);
constexpr int THREADS = SIMDS * LANES;
constexpr int SIZE = Chunk<T>::SIZE;
const uint rows = x_shape[0];
const uint groups = x_shape[1];
const uint length = x_shape[2];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = simdgroups_per_threadgroup;
const uint group = threadgroup_position_in_grid.y;
const Place place = place_of<SIMDS, LANES>(threadgroup_position_in_grid.x, simdgroup, simdgroups, lane);
const uint thread_in_row = place.thread_in_row;
const uint workers = threadgroups_per_grid.x * (SIMDS == 1 ? simdgroups * (32 / LANES) : 1);

float gradient[CHUNKS][SIZE];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < SIZE; i++) gradient[c][i] = 0.0f;
}

// All lanes of a simdgroup take as many turns, though the last may find some of them without a row.
uint turn = 0;
for (uint start = 0; start < rows; start += workers) {
  const uint row = start + place.row;
  const size_t offset = (size_t(row) * groups + group) * length;
  const uint end = row < rows ? length : 0;
  Chunk<T> held[CHUNKS];
  Chunk<T> gates[CHUNKS];
  Chunk<T> cotangents[CHUNKS];
  read_row<THREADS>(held, x + offset, thread_in_row, end);
  read_row<THREADS>(gates, gate + offset, thread_in_row, end);
  read_row<THREADS>(cotangents, dy + offset, thread_in_row, end);

  float weights[CHUNKS][SIZE];
  read_beside<THREADS, true, T, W>(weights, weight + size_t(group) * length, thread_in_row, length);
  float sigmoids[CHUNKS][SIZE];
  float sums[2] = {0.0f, 0.0f};
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      const float z = float(gates[c].values[i]);
      sigmoids[c][i] = sigmoid_of(z).value;
      const float s = z * sigmoids[c][i];
      const float u = float(held[c].values[i]) * (GATE_FIRST ? s : 1.0f);
      const float g = float(cotangents[c].values[i]) * (GATE_FIRST ? 1.0f : s);
      sums[0] += u * u;
      sums[1] += weights[c][i] * g * u;
    }
  }
  row_sums<SIMDS, LANES>(sums, partial[turn], simdgroup, lane);
  turn ^= 1;
  if (row >= rows) continue;
  const float scale = metal::rsqrt(sums[0] / float(length) + as_type<float>(EPS));
  const float shrink = scale * scale * sums[1] / float(length);
  // Again, out of a cache: in the meantime they would take registers that other groups can use.
  read_beside<THREADS, true, T, W>(weights, weight + size_t(group) * length, thread_in_row, length);

  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      const float xi = float(held[c].values[i]);
      const float z = float(gates[c].values[i]);
      const float dyi = float(cotangents[c].values[i]);
      const float w = weights[c][i];
      const float s = z * sigmoids[c][i];
      const float u = xi * (GATE_FIRST ? s : 1.0f);
      const float g = dyi * (GATE_FIRST ? 1.0f : s);
      const float du = scale * (w * g - u * shrink);
      gradient[c][i] += g * u * scale;
      const float ds = GATE_FIRST ? du * xi : dyi * u * scale * w;
      held[c].values[i] = T(du * (GATE_FIRST ? s : 1.0f));
      const float slope = sigmoids[c][i] * (1.0f + z * (1.0f - sigmoids[c][i]));
      gates[c].values[i] = T(ds * slope);
    }
  }
  write_row<THREADS>(dx + offset, held, thread_in_row, end);
  write_row<THREADS>(dgate + offset, gates, thread_in_row, end);
}

const size_t row = size_t(place.row) * groups + group;
write_gradient<THREADS, T>(dweight + row * length, gradient, thread_in_row, length);

// The gradient of layer normalization, and of a residual addition before it.
//
//   d       = x - mean(x),   r = 1 / sqrt(mean(d²) + EPS),   g = weight · dy
//   dx      = r · (g - mean(g) - d · r² · mean(g · d)) + dsum    [N, D] of T
//   dweight = dy · d · r, added up over the rows of one worker   [R, P] of float
//   dbias   = dy, added up over the rows of one worker           [R, Q] of float
//
// x, dy: [N, D] of T: what was normalized, and the gradient of the result. weight: [P] of W, with P = D; or, where not
// WEIGHTED, not read, and P is 1 and dweight 0. Q = D; or, where not BIASED, Q is 1 and dbias 0.
// dsum: [N, D] of T: the gradient of x itself where x was ADDED up and returned too; else not read.
// EPS: bits of a float. Worker k of R takes rows k, k + R, ...; a thread holds CHUNKS chunks of a row in registers.
// Grid: a group of SIMDS simdgroups a worker; with SIMDS = 1, a worker for each LANES lanes. Threadgroup memory: 256 bytes.

// ---- body ----
THREADGROUP_ARRAY(float, partial, [64]);
constexpr int THREADS = SIMDS * LANES;
constexpr int SIZE = Chunk<T>::SIZE;
const uint rows = x_shape[0];
const uint length = x_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = simdgroups_per_threadgroup;
const Place place = place_of<SIMDS, LANES>(threadgroup_position_in_grid.x, simdgroup, simdgroups, lane);
const uint thread_in_row = place.thread_in_row;
const uint workers = threadgroups_per_grid.x * (SIMDS == 1 ? simdgroups * (32 / LANES) : 1);

float to_weight[CHUNKS][SIZE];
float to_bias[CHUNKS][SIZE];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < SIZE; i++) to_weight[c][i] = to_bias[c][i] = 0.0f;
}

// All lanes of a simdgroup take as many turns, though the last may find some of them without a row.
for (uint start = 0; start < rows; start += workers) {
  const uint row = start + place.row;
  const size_t offset = size_t(row) * length;
  const uint end = row < rows ? length : 0;
  Chunk<T> held[CHUNKS];
  Chunk<T> cotangents[CHUNKS];
  Chunk<T> passed[CHUNKS];
  read_row<THREADS>(held, x + offset, thread_in_row, end);
  read_row<THREADS>(cotangents, dy + offset, thread_in_row, end);
  if (ADDED) read_row<THREADS>(passed, dsum + offset, thread_in_row, end);

  const float mean = mean_of<SIMDS, LANES>(held, length, partial, simdgroup, lane);
  float sums[3] = {0.0f, 0.0f, 0.0f};
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = first_of<T, THREADS>(c, thread_in_row);
    const int left = int(length) - int(first);
    float weights[SIZE];
    if (WEIGHTED) read_floats<W, SIZE>(weight, first, length, weights);
    for (int i = 0; i < SIZE; i++) {
      const float d = deviation(held[c].values[i], mean, i < left);
      float g = float(cotangents[c].values[i]);
      if (WEIGHTED) g *= weights[i];
      sums[0] += d * d;
      sums[1] += g;
      sums[2] += g * d;
    }
  }
  row_sums<SIMDS, LANES>(sums, partial + 16, simdgroup, lane);
  if (row >= rows) continue;
  const float scale = metal::rsqrt(sums[0] / float(length) + as_type<float>(EPS));
  const float shift = sums[1] / float(length);
  const float shrink = scale * scale * sums[2] / float(length);

  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = first_of<T, THREADS>(c, thread_in_row);
    float weights[SIZE];
    if (WEIGHTED) read_floats<W, SIZE>(weight, first, length, weights);
    for (int i = 0; i < SIZE; i++) {
      const float d = float(held[c].values[i]) - mean;
      const float dyi = float(cotangents[c].values[i]);
      const float g = WEIGHTED ? dyi * weights[i] : dyi;
      to_weight[c][i] += dyi * d * scale;
      to_bias[c][i] += dyi;
      const float dxi = scale * (g - shift - d * shrink);
      held[c].values[i] = T(ADDED ? float(passed[c].values[i]) + dxi : dxi);
    }
    write_chunk<T>(dx + offset, first, end, held[c]);
  }
}

if (WEIGHTED) {
  write_gradient<THREADS, T>(dweight + size_t(place.row) * length, to_weight, thread_in_row, length);
} else if (thread_in_row == 0) {
  dweight[place.row] = 0.0f;
}
if (BIASED) {
  write_gradient<THREADS, T>(dbias + size_t(place.row) * length, to_bias, thread_in_row, length);
} else if (thread_in_row == 0) {
  dbias[place.row] = 0.0f;
}

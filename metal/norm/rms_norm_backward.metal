// The gradient of root-mean-square normalization, and of a residual addition before it.
//
//   r       = 1 / sqrt(mean(x²) + EPS)
//   dx      = r · (w · dy - x · r² · mean(w · dy · x)) + dsum    [N, D] of T
//   dweight = dy · x · r, added up over the rows of one worker   [R, P] of float
//
// x, dy: [N, D] of T: what was normalized, and the gradient of the result. weight: [P] of W. w = weight, or 1 + weight
// where UNIT_OFFSET, with P = D; or, where not WEIGHTED, 1, and weight is not read, P is 1 and dweight 0.
// dsum: [N, D] of T: the gradient of x itself where x was ADDED up and returned too; else not read.
// EPS: bits of a float. Worker k of R takes rows k, k + R, ...; a thread holds CHUNKS chunks of a row in registers.
// Grid: a group of SIMDS simdgroups a worker; with SIMDS = 1, a worker for each LANES lanes. Threadgroup memory: 256 bytes.

// ---- body ----
THREADGROUP_ARRAY(float, partial, [2][32]);
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

float gradient[CHUNKS][SIZE];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < SIZE; i++) gradient[c][i] = 0.0f;
}

// All lanes of a simdgroup take as many turns, though the last may find some of them without a row.
uint turn = 0;
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

  float weights[CHUNKS][SIZE];
  read_beside<THREADS, WEIGHTED, T, W>(weights, weight, thread_in_row, length);
  float sums[2] = {0.0f, 0.0f};
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      const float xi = float(held[c].values[i]);
      const float w = factor_of<WEIGHTED, UNIT_OFFSET>(weights[c][i]);
      sums[0] += xi * xi;
      sums[1] += w * float(cotangents[c].values[i]) * xi;
    }
  }
  row_sums<SIMDS, LANES>(sums, partial[turn], simdgroup, lane);
  turn ^= 1;
  if (row >= rows) continue;
  const float scale = metal::rsqrt(sums[0] / float(length) + as_type<float>(EPS));
  const float shrink = scale * scale * sums[1] / float(length);
  // Again, out of a cache: in the meantime they would take registers that other groups can use.
  read_beside<THREADS, WEIGHTED, T, W>(weights, weight, thread_in_row, length);

  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      const float xi = float(held[c].values[i]);
      const float gi = float(cotangents[c].values[i]);
      const float w = factor_of<WEIGHTED, UNIT_OFFSET>(weights[c][i]);
      gradient[c][i] += gi * xi * scale;
      const float dxi = scale * (w * gi - xi * shrink);
      held[c].values[i] = T(ADDED ? float(passed[c].values[i]) + dxi : dxi);
    }
  }
  write_row<THREADS>(dx + offset, held, thread_in_row, end);
}

if (WEIGHTED) {
  write_gradient<THREADS, T>(dweight + size_t(place.row) * length, gradient, thread_in_row, length);
} else if (thread_in_row == 0) {
  dweight[place.row] = 0.0f;
}

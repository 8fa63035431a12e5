// The gradient of residual addition and root-mean-square normalization.
//
//   r       = 1 / sqrt(mean(sum²) + EPS)
//   dx      = dsum + r · (w · dy - sum · r² · mean(w · dy · sum))    [N, D] of T; that of residual is the same
//   dweight = dy · sum · r, added up over the rows of one worker     [R, D] of float
//
// sum, dy, dsum: [N, D] of T; weight: [D] of W, w = weight, or 1 + weight where UNIT_OFFSET.
// EPS: bits of a float. Worker k of R takes rows k, k + R, ...; a thread keeps CHUNKS chunks of a row in registers.
// Grid: a group of SIMDS simdgroups a worker; with SIMDS = 1, a worker a simdgroup. Threadgroup memory: 256 bytes.

// ---- body ----
THREADGROUP_ARRAY(float, squares_of, [32]);
THREADGROUP_ARRAY(float, dots_of, [32]);
constexpr int SIZE = Chunk<T>::SIZE;
const uint rows = sum_shape[0];
const uint length = sum_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = simdgroups_per_threadgroup;
const Place place = place_of<SIMDS>(threadgroup_position_in_grid.x, simdgroup, simdgroups, lane);
const uint workers = threadgroups_per_grid.x * (SIMDS == 1 ? simdgroups : 1);

float w[CHUNKS][SIZE];
float gradient[CHUNKS][SIZE];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = (c * SIMDS * 32 + place.thread_in_row) * SIZE;
  read_floats<W, SIZE>(weight, first, length, w[c]);
  for (int i = 0; i < SIZE; i++) {
    if (UNIT_OFFSET) w[c][i] += 1.0f;
    gradient[c][i] = 0.0f;
  }
}

for (uint row = place.row; row < rows; row += workers) {
  const size_t offset = size_t(row) * length;
  Chunk<T> s[CHUNKS];
  Chunk<T> g[CHUNKS];
  Chunk<T> passed[CHUNKS];
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = (c * SIMDS * 32 + place.thread_in_row) * SIZE;
    s[c] = read_chunk<T>(sum + offset, first, length);
    g[c] = read_chunk<T>(dy + offset, first, length);
    passed[c] = read_chunk<T>(dsum + offset, first, length);
  }
  float squares = 0.0f;
  float dot = 0.0f;
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      squares += float(s[c].values[i]) * float(s[c].values[i]);
      dot += w[c][i] * float(g[c].values[i]) * float(s[c].values[i]);
    }
  }
  row_sums<SIMDS>(squares, dot, squares_of, dots_of, simdgroup, lane);
  const float scale = metal::rsqrt(squares / float(length) + as_type<float>(EPS));
  const float shrink = scale * scale * dot / float(length);

  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = (c * SIMDS * 32 + place.thread_in_row) * SIZE;
    if (first >= length) continue;
    Chunk<T> result;
    for (int i = 0; i < SIZE; i++) {
      const float si = float(s[c].values[i]);
      const float gi = float(g[c].values[i]);
      gradient[c][i] += gi * si * scale;
      result.values[i] = T(float(passed[c].values[i]) + scale * (w[c][i] * gi - si * shrink));
    }
    write_chunk<T>(dx + offset, first, length, result);
  }
}

const size_t offset = size_t(place.row) * length;
for (int c = 0; c < CHUNKS; c++) {
  const uint first = (c * SIMDS * 32 + place.thread_in_row) * SIZE;
  for (int i = 0; i < SIZE; i++) {
    if (first + i < length) dweight[offset + first + i] = gradient[c][i];
  }
}

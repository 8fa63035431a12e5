// The gradient of residual addition and root-mean-square normalization.
//
//   r       = 1 / sqrt(mean(sum²) + EPS)
//   dx      = dsum + r · (w · dy - sum · r² · mean(w · dy · sum))    [N, D] of T; that of residual is the same
//   dweight = dy · sum · r, added up over the rows of one worker     [R, D] of float
//
// sum, dy, dsum: [N, D] of T; weight: [D] of W, w = weight, or 1 + weight where UNIT_OFFSET.
// EPS: bits of a float. Worker k of R takes rows k, k + R, ...; a thread keeps CHUNKS chunks of a row in registers.
// Grid: a group of SIMDS simdgroups a worker; with SIMDS = 1, a worker a simdgroup. Threadgroup memory: 128 bytes.

// ---- body ----
THREADGROUP_ARRAY(float, partial, [32]);
const uint rows = sum_shape[0];
const uint length = sum_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint simdgroups = simdgroups_per_threadgroup;
const Place place = place_of<SIMDS>(threadgroup_position_in_grid.x, simdgroup, simdgroups, lane);
const uint workers = threadgroups_per_grid.x * (SIMDS == 1 ? simdgroups : 1);

float gradient[CHUNKS][Chunk<T>::SIZE];
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  for (int i = 0; i < Chunk<T>::SIZE; i++) gradient[c][i] = 0.0f;
}

for (uint row = place.row; row < rows; row += workers) {
  const size_t offset = size_t(row) * length;
  Chunk<T> s[CHUNKS];
  Chunk<T> g[CHUNKS];
  float squares = 0.0f;
  float dot = 0.0f;
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = (c * SIMDS * 32 + place.thread_in_row) * Chunk<T>::SIZE;
    if (first >= length) continue;
    s[c] = read_chunk<T>(sum + offset, first, length);
    g[c] = read_chunk<T>(dy + offset, first, length);
    for (int i = 0; i < Chunk<T>::SIZE; i++) {
      const uint column = first + i < length ? first + i : 0;
      const float w = float(weight[column]) + (UNIT_OFFSET ? 1.0f : 0.0f);
      squares += float(s[c].values[i]) * float(s[c].values[i]);
      dot += w * float(g[c].values[i]) * float(s[c].values[i]);
    }
  }
  squares = row_sum<SIMDS>(squares, partial, simdgroup, lane);
  dot = row_sum<SIMDS>(dot, partial, simdgroup, lane);
  const float scale = metal::rsqrt(squares / float(length) + as_type<float>(EPS));
  const float shrink = scale * scale * dot / float(length);

  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = (c * SIMDS * 32 + place.thread_in_row) * Chunk<T>::SIZE;
    if (first >= length) continue;
    const Chunk<T> passed = read_chunk<T>(dsum + offset, first, length);
    Chunk<T> result;
    for (int i = 0; i < Chunk<T>::SIZE; i++) {
      const uint column = first + i < length ? first + i : 0;
      const float w = float(weight[column]) + (UNIT_OFFSET ? 1.0f : 0.0f);
      const float si = float(s[c].values[i]);
      const float gi = float(g[c].values[i]);
      gradient[c][i] += gi * si * scale;
      result.values[i] = T(float(passed.values[i]) + scale * (w * gi - si * shrink));
    }
    write_chunk<T>(dx + offset, first, length, result);
  }
}

const size_t offset = size_t(place.row) * length;
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  const uint first = (c * SIMDS * 32 + place.thread_in_row) * Chunk<T>::SIZE;
  for (int i = 0; i < Chunk<T>::SIZE; i++) {
    if (first + i < length) dweight[offset + first + i] = gradient[c][i];
  }
}

// Root-mean-square normalization of rows that are held in registers.

// What an element of this weight is scaled by: the weight, or one plus it, or one where there is none.
template <bool WEIGHTED, bool UNIT_OFFSET>
METAL_FUNC float factor_of(float weight) {
  if (!WEIGHTED) return 1.0f;
  return UNIT_OFFSET ? 1.0f + weight : weight;
}

// Normalizes a row of `length` elements, zeros beyond, and writes it, up to `end`; `partial` holds SIMDS numbers.
//
// Weights are read last and chunk by chunk: they come out of a cache, and registers are needed for other rows.
template <
    int SIMDS, int LANES, bool WEIGHTED, bool UNIT_OFFSET, typename W,
    typename T, int CHUNKS, typename Pointer>
METAL_FUNC void rms_normalize(
    device T* y, thread Chunk<T> (&held)[CHUNKS], Pointer weight,
    uint thread_in_row, uint length, uint end, float eps,
    threadgroup float* partial, uint simdgroup, uint lane) {
  const int N = Chunk<T>::SIZE;
  float squares[1] = {0.0f};
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < N; i++) {
      squares[0] += float(held[c].values[i]) * float(held[c].values[i]);
    }
  }
  row_sums<SIMDS, LANES>(squares, partial, simdgroup, lane);
  const float scale = metal::rsqrt(squares[0] / float(length) + eps);
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = first_of<T, SIMDS * LANES>(c, thread_in_row);
    float weights[N];
    if (WEIGHTED) read_floats<W, N>(weight, first, length, weights);
    for (int i = 0; i < N; i++) {
      const float w = factor_of<WEIGHTED, UNIT_OFFSET>(weights[i]);
      held[c].values[i] = T(float(held[c].values[i]) * scale * w);
    }
    write_chunk<T>(y, first, end, held[c]);
  }
}

// Layer normalization of rows that are held in registers.

// The mean of a row of `length` elements, zeros beyond; `partial` holds SIMDS numbers.
template <int SIMDS, int LANES, typename T, int CHUNKS>
METAL_FUNC float mean_of(
    thread const Chunk<T> (&held)[CHUNKS], uint length,
    threadgroup float* partial, uint simdgroup, uint lane) {
  float total[1] = {0.0f};
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < Chunk<T>::SIZE; i++) total[0] += float(held[c].values[i]);
  }
  row_sums<SIMDS, LANES>(total, partial, simdgroup, lane);
  return total[0] / float(length);
}

// The deviation from the mean of an element of the row; none where it is beyond the end.
template <typename T>
METAL_FUNC float deviation(T value, float mean, bool inside) {
  return inside ? float(value) - mean : 0.0f;
}

// Normalizes a row and writes it, up to `end`; `partial` and `other` hold SIMDS numbers each.
//
// The mean comes first and the squares are of the deviations from it: mean(x²) - mean(x)² would cancel. Weights
// and biases are read last and chunk by chunk: they come out of a cache, and registers are needed for other rows.
template <
    int SIMDS, int LANES, bool WEIGHTED, bool BIASED, typename W, typename B,
    typename T, int CHUNKS, typename Weights, typename Biases>
METAL_FUNC void standardize(
    device T* y, thread Chunk<T> (&held)[CHUNKS], Weights weight, Biases bias,
    uint thread_in_row, uint length, uint end, float eps,
    threadgroup float* partial, threadgroup float* other, uint simdgroup, uint lane) {
  const int N = Chunk<T>::SIZE;
  const float mean = mean_of<SIMDS, LANES>(held, length, partial, simdgroup, lane);
  float squares[1] = {0.0f};
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const int left = int(length) - int(first_of<T, SIMDS * LANES>(c, thread_in_row));
    for (int i = 0; i < N; i++) {
      const float d = deviation(held[c].values[i], mean, i < left);
      squares[0] += d * d;
    }
  }
  row_sums<SIMDS, LANES>(squares, other, simdgroup, lane);
  const float scale = metal::rsqrt(squares[0] / float(length) + eps);
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = first_of<T, SIMDS * LANES>(c, thread_in_row);
    float weights[N];
    float biases[N];
    if (WEIGHTED) read_floats<W, N>(weight, first, length, weights);
    if (BIASED) read_floats<B, N>(bias, first, length, biases);
    for (int i = 0; i < N; i++) {
      float value = (float(held[c].values[i]) - mean) * scale;
      if (WEIGHTED) value *= weights[i];
      if (BIASED) value += biases[i];
      held[c].values[i] = T(value);
    }
    write_chunk<T>(y, first, end, held[c]);
  }
}

// Root-mean-square normalization of heads that LANES threads share. Stands on heads.metal.

struct Scaling {
  float eps;
  float offset;  // added to the weight
};

METAL_FUNC Scaling scaling_of(int eps_bits, bool unit_offset) {
  Scaling scaling;
  scaling.eps = as_type<float>(eps_bits);
  scaling.offset = unit_offset ? 1.0f : 0.0f;
  return scaling;
}

// What normalized values are multiplied by.
template <typename T, typename W, typename Pointer>
METAL_FUNC Values<T> factor_of(Pointer weight, Spans spans, Scaling scaling) {
  Values<T> factor;
  UNROLL
  for (int part = 0; part < 2; part++) {
    thread float* values = factor.at + part * Chunk<T>::SIZE;
    read_floats<W, Chunk<T>::SIZE>(weight, spans.first[part], spans.end[part], values);
  }
  UNROLL
  for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) factor.at[i] += scaling.offset;
  return factor;
}

// What a thread knows of its slots, ROUNDS of them, whichever the head: `turn` holds for the heads of one token.
template <typename T, int ROUNDS>
struct Common {
  Spans spans[ROUNDS];
  Values<T> factor[ROUNDS];
  Turn<T> turn[ROUNDS];
  bool turns[ROUNDS];
};

template <typename T>
METAL_FUNC float product_of(Values<T> a, Values<T> b) {
  float sum = 0.0f;
  UNROLL
  for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) sum += a.at[i] * b.at[i];
  return sum;
}

// The sum over the threads of a unit, in each of them. LANES: a power of two, up to 32.
template <int LANES>
METAL_FUNC float sum_of_lanes(float value) {
  UNROLL
  for (int mask = LANES / 2; mask > 0; mask /= 2) value += simd_shuffle_xor(value, ushort(mask));
  return value;
}

// The sum over the threads of a simdgroup that stand in the same place of their units, in each of them.
template <int LANES>
METAL_FUNC float sum_of_units(float value) {
  UNROLL
  for (int mask = LANES; mask < 32; mask *= 2) value += simd_shuffle_xor(value, ushort(mask));
  return value;
}

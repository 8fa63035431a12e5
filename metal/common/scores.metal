// Scores of attention: which keys a query sees, and what becomes of the product with each.

// The keys from `first` to before `last`; ALiBi counts from `diagonal`.
struct Sight {
  int first;
  int last;
  int diagonal;
};

// The number of the segment that `row` is in, of those that begin at `starts`.
template <typename Starts>
METAL_FUNC int segment_of(int row, Starts starts, int segments) {
  int low = 0;
  int high = segments;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// What query `row` of `rows` sees of `keys` keys: fewer than LEFT before the diagonal, which ends at the last row and key,
// and fewer than RIGHT after it; all, where one of these is zero. Both ends of what rows see go up with the rows, if starts
// do; if not, they still lie among the keys.
template <int LEFT, int RIGHT, bool SEGMENTED, typename Starts>
METAL_FUNC Sight sight_of(int row, int rows, int keys, Starts query_starts, Starts key_starts, int segments) {
  int low = 0;
  int high = keys;
  int shift = keys - rows;
  if (SEGMENTED) {
    const int segment = segment_of(row, query_starts, segments);
    low = metal::clamp(key_starts[segment], 0, keys);
    high = metal::clamp(key_starts[segment + 1], low, keys);
    shift = high - query_starts[segment + 1];
    // Outside of all segments nothing is seen.
    if (row < query_starts[segment]) high = low;
    if (row >= query_starts[segment + 1]) low = high;
  }
  Sight sight;
  sight.diagonal = row + shift;
  sight.first = LEFT == 0 ? low : metal::min(high, metal::max(low, sight.diagonal - LEFT + 1));
  sight.last = RIGHT == 0 ? high : metal::min(high, metal::max(low, sight.diagonal + RIGHT));
  return sight;
}

// How far the key is from the diagonal.
METAL_FUNC float distance_of(Sight sight, int key) { return metal::fabs(float(sight.diagonal - key)); }

// For numbers of 16 bits of which 8 are the exponent's, as exact as NVIDIA's instruction, 2^-11 of the result; else in f32.
template <typename T>
METAL_FUNC float tanh_of(float x) {
#ifdef METAL_CUDA
  if (metal::is_coarse(T())) return metal::fast::tanh(x);
#endif
  // Near 0 the difference from 1 has no digits left, and a cap far above the scores multiplies what is.
  const float squared = x * x;
  const float near = x + x * squared * (squared * 0.13333334f - 0.33333334f);
  const float far = 1.0f - metal::fast::divide(2.0f, 1.0f + metal::fast::exp2(2.0f * M_LOG2E_F * x));
  return squared < 0.00390625f ? near : far;
}

// The product of a query and a key, scaled and capped, in units of log2(e). `scale`: that of scores, in these units where
// there is no cap.
template <typename T, bool CAPPED>
METAL_FUNC float scaled_score(float product, float scale, float cap) {
  if (!CAPPED) return product * scale;
  return M_LOG2E_F * cap * tanh_of<T>(metal::fast::divide(product * scale, cap));
}

// Derivative of the capped score by what was capped.
template <bool CAPPED>
METAL_FUNC float cap_slope(float score, float cap) {
  if (!CAPPED) return 1.0f;
  const float ratio = score / (M_LOG2E_F * cap);
  return 1.0f - ratio * ratio;
}

// Masks from here down hide a key altogether.
constant constexpr const float HIDES = -32768.0f;

// What is added to the score of a query and a key. A mask has ones for axes along which it is the same.
template <typename Mask, typename Shape>
METAL_FUNC float mask_at(Mask mask, Shape shape, int batch, int head, int query, int key) {
  size_t at = shape[0] == 1 ? 0 : batch;
  at = at * shape[1] + (shape[1] == 1 ? 0 : head);
  at = at * shape[2] + (shape[2] == 1 ? 0 : query);
  return float(mask[at * shape[3] + (shape[3] == 1 ? 0 : key)]);
}

// The score of a query, where it sees the key and no mask hides that, else minus infinity. `unit`: what a score of 1 is
// held as.
template <bool MASKED, typename Mask, typename Shape>
METAL_FUNC float seen_score(
    float score, Sight sight, int key, float unit, Mask mask, Shape mask_shape, int batch, int head, int query) {
  if (key < sight.first || key >= sight.last) return -INFINITY;
  if (!MASKED) return score;
  const float added = mask_at(mask, mask_shape, batch, head, query, key);
  return added <= HIDES ? -INFINITY : score + unit * added;
}

// Scores of attention: which keys a query sees, and what becomes of the product with each.

constant constexpr const float LOG2_E = 1.4426950408889634f;

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

METAL_FUNC float tanh_of(float x) {
  return 1.0f - metal::fast::divide(2.0f, 1.0f + metal::fast::exp2(2.0f * LOG2_E * x));
}

// The product of a query and a key, scaled and capped, in units of log2(e). `scale`: that of scores, in these units where
// there is no cap.
template <bool CAPPED>
METAL_FUNC float scaled_score(float product, float scale, float cap) {
  if (!CAPPED) return product * scale;
  return LOG2_E * cap * tanh_of(metal::fast::divide(product * scale, cap));
}

// Derivative of the capped score by what was capped.
template <bool CAPPED>
METAL_FUNC float cap_slope(float score, float cap) {
  if (!CAPPED) return 1.0f;
  const float ratio = score / (LOG2_E * cap);
  return 1.0f - ratio * ratio;
}

// One array of heads, [B, H, S, D], or [B, S, H, D] where token-major.
struct Heads {
  int batch;
  int heads;
  int length;
  int size;
  bool token_major;

  // Where the row of a token begins.
  METAL_FUNC size_t row(int batch_index, int head, int token) const {
    const size_t before = token_major ? (size_t(batch_index) * length + token) * heads + head
                                      : (size_t(batch_index) * heads + head) * length + token;
    return before * size;
  }
};

template <bool TOKEN_MAJOR, typename Shape>
METAL_FUNC Heads heads_of(Shape shape) {
  Heads all;
  all.batch = shape[0];
  all.heads = TOKEN_MAJOR ? shape[2] : shape[1];
  all.length = TOKEN_MAJOR ? shape[1] : shape[2];
  all.size = shape[3];
  all.token_major = TOKEN_MAJOR;
  return all;
}

// Copies COUNT rows of a head, of SIZE numbers each, to threadgroup memory, where they are after finish_copies and a
// barrier: zeros beyond the end of a row, the last row beyond the last.
template <typename T, int COUNT, int SIZE, int STRIDE, int THREADS, typename Pointer>
METAL_FUNC void stage_rows(
    threadgroup T* target, Pointer source, Heads all, int batch, int head, int first, bool whole, int thread_in_group) {
  constexpr int CHUNKS = SIZE / Chunk<T>::SIZE;
  UNROLL
  for (int turn = 0; turn < (COUNT * CHUNKS + THREADS - 1) / THREADS; turn++) {
    const int chunk = turn * THREADS + thread_in_group;
    if (chunk >= COUNT * CHUNKS) break;
    const int column = chunk % CHUNKS * Chunk<T>::SIZE;
    const int token = metal::min(first + chunk / CHUNKS, all.length - 1);
    Pointer row = source + all.row(batch, head, token);
    threadgroup T* place = target + chunk / CHUNKS * STRIDE + column;
    if (whole) {
      begin_copy<T>(place, row + column);
    } else {
      store_chunk<T>(place, read_chunk<T>(row, column, all.size));
    }
  }
}

// What is added to the score of a query and a key. A mask has ones for axes along which it is the same.
template <typename Mask, typename Shape>
METAL_FUNC float mask_at(Mask mask, Shape shape, int batch, int head, int query, int key) {
  size_t at = shape[0] == 1 ? 0 : batch;
  at = at * shape[1] + (shape[1] == 1 ? 0 : head);
  at = at * shape[2] + (shape[2] == 1 ? 0 : query);
  return float(mask[at * shape[3] + (shape[3] == 1 ? 0 : key)]);
}

// Masks from here down hide a key altogether.
constant constexpr const float HIDES = -32768.0f;

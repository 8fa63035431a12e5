// Softmax attention that holds no matrix of scores.
//
//   s   = cap(scale · q kᵀ) - slope · |distance| + mask, minus infinity where a query does not see a key
//   y   = softmax(s) v, where a sink, if there is one, takes part in the softmax and has no value
//   lse = log(sum(exp(s)) + exp(sink))
//
// queries: [B, X, Y, D], keys: [B, Z, W, D], values: [B, Z, W, V] of T; X and Y are the length and the heads where
// TOKEN_MAJOR, else the heads and the length, and so with Z and W. mask: [A, E, F, G] of T, with ones where it is the same
// for all, read where MASKED. slopes: [I, J], for batch and heads or for heads
// alone, read where ALIBI. sinks: [N], read where SINKS. query_starts, key_starts: [P], cumulated lengths, read where
// SEGMENTED. y: [B, X, Y, V] of T; lse: [B, H, S] of float.
// SCALE, SOFT_CAP: bits of floats, no cap where zero. LEFT, RIGHT: as in scores.metal. SIZE, VALUE_SIZE: D and V rounded up
// to 16. KEYS at a time are worked on, a multiple of 16.
// Grid: groups of SIMDS simdgroups, one for 16 · TALL queries each: x for queries, y for heads, z for the batch.
// Threadgroup memory: BUFFERS · KEYS · (SIZE + VALUE_SIZE + 2 · PAD) of T; with two buffers, the keys and values of the next
// round arrive while those of this one are worked on.
// Dao et al., FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, 2022 (arXiv:2205.14135).

// ---- body ----
constexpr int STRIDE = SIZE + PAD;
constexpr int VALUE_STRIDE = VALUE_SIZE + PAD;
constexpr int THREADS = 32 * SIMDS;
constexpr int ROWS = 16 * TALL;  // of a simdgroup
constexpr int TILES = SIZE / 16;
constexpr int VALUE_TILES = VALUE_SIZE / 16;
constexpr int KEY_TILES = KEYS / 16;
constexpr int BUFFER = KEYS * (STRIDE + VALUE_STRIDE);
constexpr bool CAPPED = SOFT_CAP != 0;
THREADGROUP_ARRAY(T, staged, [BUFFERS * BUFFER]);

const Heads all_queries = heads_of<TOKEN_MAJOR>(queries_shape);
const Heads all_keys = heads_of<TOKEN_MAJOR>(keys_shape);
const Heads all_values = heads_of<TOKEN_MAJOR>(values_shape);
const int rows = all_queries.length;
const int heads = all_queries.heads;
const int keys_count = all_keys.length;
const int index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const int key_head = head / (heads / all_keys.heads);

// The last rows see the most keys: they come first.
const int first_row = int(threadgroups_per_grid.x - 1 - threadgroup_position_in_grid.x) * ROWS * SIMDS;
const int last_row = metal::min(first_row + ROWS * SIMDS, rows) - 1;
const int my_rows = first_row + simdgroup * ROWS;

const float cap = as_type<float>(SOFT_CAP);
const float scale = as_type<float>(SCALE) * (CAPPED ? 1.0f : LOG2_E);
const int segments = SEGMENTED ? query_starts_shape[0] - 1 : 0;
const float slope = ALIBI ? LOG2_E * slopes[(slopes_shape[0] == 1 ? 0 : batch) * heads + head] : 0.0f;

// Queries, through threadgroup memory, some tiles at a time.
constexpr int AT_ONCE = BUFFERS * BUFFER / (16 * STRIDE);
Tile<T> query_tiles[TALL][TILES];
for (int first = 0; first < SIMDS * TALL; first += AT_ONCE) {
  stage_rows<T, 16 * AT_ONCE, SIZE, STRIDE, THREADS>(
      staged, queries, all_queries, batch, head, first_row + first * 16,
      SIZE == all_queries.size && begins_a_chunk(queries), index);
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int m = 0; m < TALL; m++) {
    const int place = simdgroup * TALL + m - first;
    if (place >= 0 && place < AT_ONCE) {
      UNROLL
      for (int t = 0; t < TILES; t++) query_tiles[m][t].load(staged + place * 16 * STRIDE + t * 16, STRIDE);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Of the two rows that a lane has of each tile.
Sight sights[TALL][2];
float most[TALL][2];
float sums[TALL][2];
Tile<float> results[TALL][VALUE_TILES];
UNROLL
for (int m = 0; m < TALL; m++) {
  UNROLL
  for (int half = 0; half < 2; half++) {
    const int row = metal::min(my_rows + 16 * m + int(tile_place(0, lane).row) + half * TILE_HALVES_APART, rows - 1);
    sights[m][half] = sight_of<LEFT, RIGHT, SEGMENTED>(row, rows, keys_count, query_starts, key_starts, segments);
    most[m][half] = -INFINITY;
    sums[m][half] = 0.0f;
  }
  UNROLL
  for (int t = 0; t < VALUE_TILES; t++) results[m][t].fill(0.0f);
}
const Sight top = sight_of<LEFT, RIGHT, SEGMENTED>(first_row, rows, keys_count, query_starts, key_starts, segments);
const Sight bottom = sight_of<LEFT, RIGHT, SEGMENTED>(last_row, rows, keys_count, query_starts, key_starts, segments);
const bool whole_keys = SIZE == all_keys.size && begins_a_chunk(keys);
const bool whole_values = VALUE_SIZE == all_values.size && begins_a_chunk(values);
const int begin = top.first / KEYS * KEYS;
const int end = bottom.last;

for (int start = begin - (BUFFERS - 1) * KEYS; start < end; start += KEYS) {
  const int coming = start + (BUFFERS - 1) * KEYS;
  if (BUFFERS == 2 && start >= begin) {
    finish_copies();
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (coming < end) {
    threadgroup T* target = staged + (BUFFERS == 2 ? coming / KEYS % 2 : 0) * BUFFER;
    stage_rows<T, KEYS, SIZE, STRIDE, THREADS>(target, keys, all_keys, batch, key_head, coming, whole_keys, index);
    stage_rows<T, KEYS, VALUE_SIZE, VALUE_STRIDE, THREADS>(
        target + KEYS * STRIDE, values, all_values, batch, key_head, coming, whole_values, index);
  }
  if (BUFFERS == 1) {
    finish_copies();
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (start < begin) continue;
  threadgroup T* staged_keys = staged + (BUFFERS == 2 ? start / KEYS % 2 : 0) * BUFFER;
  threadgroup T* staged_values = staged_keys + KEYS * STRIDE;

  Tile<float> scores[TALL][KEY_TILES];
  UNROLL
  for (int m = 0; m < TALL; m++) {
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) scores[m][t].fill(0.0f);
  }
  UNROLL
  for (int d = 0; d < TILES; d++) {
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) {
      RightTile<T> right;
      right.load_transposed(staged_keys + t * 16 * STRIDE + d * 16, STRIDE);
      UNROLL
      for (int m = 0; m < TALL; m++) multiply_tiles(scores[m][t], query_tiles[m][d], right);
    }
  }

  const bool seen_by_all = start >= bottom.first && start + KEYS <= top.last;
  Tile<T> weights[TALL][KEY_TILES];
  UNROLL
  for (int m = 0; m < TALL; m++) {
    float highest[2] = {-INFINITY, -INFINITY};
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) {
        const int half = tile_half(e);
        float score = scaled_score<CAPPED>(scores[m][t].value(e), scale, cap);
        if (MASKED || ALIBI || !seen_by_all) {
          const TilePlace place = tile_place(e, lane);
          const int key = start + t * 16 + int(place.column);
          bool seen = key >= sights[m][half].first && key < sights[m][half].last;
          if (ALIBI) score -= slope * metal::fabs(float(sights[m][half].diagonal - key));
          if (MASKED && seen) {
            const int row = metal::min(my_rows + 16 * m + int(place.row), rows - 1);
            const float added = mask_at(mask, mask_shape, batch, head, row, key);
            seen = !(added <= HIDES);
            score += LOG2_E * added;
          }
          if (!seen) score = -INFINITY;
        }
        scores[m][t].set(e, score);
        highest[half] = metal::max(highest[half], score);
      }
    }

    float rescale[2];
    float base[2];
    UNROLL
    for (int half = 0; half < 2; half++) {
      const float above = metal::max(most[m][half], tile_row_max(highest[half]));
      // Nothing seen so far: any finite number in place of minus infinity keeps NaN away.
      base[half] = above == -INFINITY ? 0.0f : above;
      rescale[half] = metal::fast::exp2(most[m][half] - base[half]);
      most[m][half] = above;
      sums[m][half] *= rescale[half];
    }
    UNROLL
    for (int t = 0; t < VALUE_TILES; t++) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) results[m][t].set(e, results[m][t].value(e) * rescale[tile_half(e)]);
    }
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) {
        const float weight = metal::fast::exp2(scores[m][t].value(e) - base[tile_half(e)]);
        sums[m][tile_half(e)] += weight;
        weights[m][t].set(e, T(weight));
      }
    }
  }

  UNROLL
  for (int t = 0; t < KEY_TILES; t++) {
    UNROLL
    for (int d = 0; d < VALUE_TILES; d++) {
      RightTile<T> right;
      right.load(staged_values + t * 16 * VALUE_STRIDE + d * 16, VALUE_STRIDE);
      UNROLL
      for (int m = 0; m < TALL; m++) multiply_tiles(results[m][d], weights[m][t], right);
    }
  }
  if (BUFFERS == 1) threadgroup_barrier(mem_flags::mem_threadgroup);
}

Heads all_results = all_queries;
all_results.size = all_values.size;
UNROLL
for (int m = 0; m < TALL; m++) {
  float factor[2];
  UNROLL
  for (int half = 0; half < 2; half++) {
    float sum = tile_row_sum(sums[m][half]);
    float base = most[m][half] == -INFINITY ? 0.0f : most[m][half];
    factor[half] = 1.0f;
    if (SINKS) {
      const float sink = LOG2_E * sinks[head];
      const float above = metal::max(most[m][half], sink);
      base = above == -INFINITY ? 0.0f : above;
      factor[half] = metal::fast::exp2(most[m][half] - base);
      sum = sum * factor[half] + metal::fast::exp2(sink - base);
    }
    factor[half] = sum == 0.0f ? 0.0f : factor[half] / sum;
    const int row = my_rows + 16 * m + int(tile_place(0, lane).row) + half * TILE_HALVES_APART;
    if (row < rows && tile_place(0, lane).column == 0) {
      lse[(size_t(batch) * heads + head) * rows + row] = sum == 0.0f ? -INFINITY : base / LOG2_E + metal::log(sum);
    }
  }
  UNROLL
  for (int t = 0; t < VALUE_TILES; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const TilePlace place = tile_place(e, lane);
      const int row = my_rows + 16 * m + int(place.row);
      const int column = t * 16 + int(place.column);
      if (row < rows && column < all_results.size) {
        y[all_results.row(batch, head, row) + column] = T(results[m][t].value(e) * factor[tile_half(e)]);
      }
    }
  }
}

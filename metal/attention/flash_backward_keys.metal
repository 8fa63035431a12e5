// The gradient of flash.metal by its keys and values.
//
//   dv = pᵀ dy    dk = scale · (cap'(..) · ds)ᵀ q    with p and ds as in flash_backward_queries.metal
//
// queries, keys, values, mask, slopes, query_starts, key_starts, dy, lse, delta and the constants as there; a group works
// for all heads of queries that read its head of keys. dkeys: as keys; dvalues: as values.
// Grid: groups of SIMDS simdgroups, one for 16 keys each: x for keys, y for their heads, z for the batch.
// Threadgroup memory: KEYS · (SIZE + VALUE_SIZE + 2 · PAD) of T, and 20 · KEYS bytes.

// The first row, of `rows`, of which the keys that it sees end (LAST), or begin, after `key`; `rows` if there is none.
template <int LEFT, int RIGHT, bool SEGMENTED, bool LAST, typename Starts>
METAL_FUNC int first_row_beyond(int key, int rows, int keys, Starts query_starts, Starts key_starts, int segments) {
  int low = 0;
  int high = rows;
  while (low < high) {
    const int middle = (low + high) / 2;
    const Sight sight = sight_of<LEFT, RIGHT, SEGMENTED>(middle, rows, keys, query_starts, key_starts, segments);
    if ((LAST ? sight.last : sight.first) > key) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// ---- body ----
constexpr int STRIDE = SIZE + PAD;
constexpr int VALUE_STRIDE = VALUE_SIZE + PAD;
constexpr int THREADS = 32 * SIMDS;
constexpr int TILES = SIZE / 16;
constexpr int VALUE_TILES = VALUE_SIZE / 16;
constexpr bool CAPPED = SOFT_CAP != 0;
THREADGROUP_ARRAY(T, staged, [KEYS * (STRIDE + VALUE_STRIDE)]);
THREADGROUP_ARRAY(int, firsts, [KEYS]);
THREADGROUP_ARRAY(int, lasts, [KEYS]);
THREADGROUP_ARRAY(int, diagonals, [KEYS]);
THREADGROUP_ARRAY(float, bases, [KEYS]);
THREADGROUP_ARRAY(float, deltas, [KEYS]);
threadgroup T* staged_queries = staged;
threadgroup T* staged_dy = staged + KEYS * STRIDE;

const Heads all_queries = heads_of<TOKEN_MAJOR>(queries_shape);
const Heads all_keys = heads_of<TOKEN_MAJOR>(keys_shape);
const Heads all_values = heads_of<TOKEN_MAJOR>(values_shape);
const Heads all_results = heads_of<TOKEN_MAJOR>(dy_shape);
const int rows = all_queries.length;
const int heads = all_queries.heads;
const int keys_count = all_keys.length;
const int index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int key_head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const int group_heads = heads / all_keys.heads;
const int first_key = int(threadgroup_position_in_grid.x) * 16 * SIMDS;
const int last_key = metal::min(first_key + 16 * SIMDS, keys_count) - 1;
const int my_keys = first_key + int(simdgroup_index_in_threadgroup) * 16;

const float cap = as_type<float>(SOFT_CAP);
const float scale = as_type<float>(SCALE) * (CAPPED ? 1.0f : M_LOG2E_F);
const int segments = SEGMENTED ? query_starts_shape[0] - 1 : 0;

const bool whole_keys = SIZE == all_keys.size && begins_a_chunk(keys);
const bool whole_values = VALUE_SIZE == all_values.size && begins_a_chunk(values);
constexpr int AT_ONCE = KEYS / 16 < SIMDS ? KEYS / 16 : SIMDS;
Tile<T> key_tiles[TILES];
Tile<T> value_tiles[VALUE_TILES];
for (int turn = 0; turn < SIMDS; turn += AT_ONCE) {
  const int first = first_key + turn * 16;
  stage_rows<T, 16 * AT_ONCE, SIZE, STRIDE, THREADS>(
      staged_queries, keys, all_keys, batch, key_head, first, whole_keys, index);
  stage_rows<T, 16 * AT_ONCE, VALUE_SIZE, VALUE_STRIDE, THREADS>(
      staged_dy, values, all_values, batch, key_head, first, whole_values, index);
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int place = int(simdgroup_index_in_threadgroup) - turn;
  if (place >= 0 && place < AT_ONCE) {
    UNROLL
    for (int t = 0; t < TILES; t++) key_tiles[t].load(staged_queries + place * 16 * STRIDE + t * 16, STRIDE);
    UNROLL
    for (int t = 0; t < VALUE_TILES; t++) {
      value_tiles[t].load(staged_dy + place * 16 * VALUE_STRIDE + t * 16, VALUE_STRIDE);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

Tile<float> dkey_tiles[TILES];
Tile<float> dvalue_tiles[VALUE_TILES];
UNROLL
for (int t = 0; t < TILES; t++) dkey_tiles[t].fill(0.0f);
UNROLL
for (int t = 0; t < VALUE_TILES; t++) dvalue_tiles[t].fill(0.0f);

const bool whole_queries = SIZE == all_queries.size && begins_a_chunk(queries);
const bool whole_dy = VALUE_SIZE == all_results.size && begins_a_chunk(dy);
const int begin = first_row_beyond<LEFT, RIGHT, SEGMENTED, true>(
    first_key, rows, keys_count, query_starts, key_starts, segments);
const int end = first_row_beyond<LEFT, RIGHT, SEGMENTED, false>(
    last_key, rows, keys_count, query_starts, key_starts, segments);
for (int head = key_head * group_heads; head < (key_head + 1) * group_heads; head++) {
  const float slope = ALIBI ? M_LOG2E_F * slopes[(slopes_shape[0] == 1 ? 0 : batch) * heads + head] : 0.0f;
  for (int start = begin / KEYS * KEYS; start < end; start += KEYS) {
    stage_rows<T, KEYS, SIZE, STRIDE, THREADS>(
        staged_queries, queries, all_queries, batch, head, start, whole_queries, index);
    stage_rows<T, KEYS, VALUE_SIZE, VALUE_STRIDE, THREADS>(
        staged_dy, dy, all_results, batch, head, start, whole_dy, index);
    for (int i = index; i < KEYS; i += THREADS) {
      const int row = metal::min(start + i, rows - 1);
      const size_t at = (size_t(batch) * heads + head) * rows + row;
      const Sight sight = sight_of<LEFT, RIGHT, SEGMENTED>(row, rows, keys_count, query_starts, key_starts, segments);
      firsts[i] = sight.first;
      lasts[i] = start + i < rows ? sight.last : sight.first;
      diagonals[i] = sight.diagonal;
      bases[i] = base_of(M_LOG2E_F * lse[at]);
      deltas[i] = delta[at];
    }
    finish_copies();
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int t = 0; t < KEYS / 16; t++) {
      Tile<float> scores;
      Tile<float> dweights;
      scores.fill(0.0f);
      dweights.fill(0.0f);
      UNROLL
      for (int d = 0; d < TILES; d++) {
        RightTile<T> right;
        right.load_transposed(staged_queries + t * 16 * STRIDE + d * 16, STRIDE);
        multiply_tiles(scores, key_tiles[d], right);
      }
      UNROLL
      for (int d = 0; d < VALUE_TILES; d++) {
        RightTile<T> right;
        right.load_transposed(staged_dy + t * 16 * VALUE_STRIDE + d * 16, VALUE_STRIDE);
        multiply_tiles(dweights, value_tiles[d], right);
      }
      Tile<T> weights;
      Tile<T> dscores;
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) {
        const TilePlace place = tile_place(e, lane);
        const int key = my_keys + int(place.row);
        const int i = t * 16 + int(place.column);
        const float capped = scaled_score<T, CAPPED>(scores.value(e), scale, cap);
        const Sight sight = {firsts[i], lasts[i], diagonals[i]};
        const float leaning = ALIBI ? capped - slope * distance_of(sight, key) : capped;
        const float score = seen_score<MASKED>(leaning, sight, key, M_LOG2E_F, mask, mask_shape, batch, head, start + i);
        const float weight = metal::fast::exp2(score - bases[i]);
        weights.set(e, T(weight));
        dscores.set(e, T(weight * (dweights.value(e) - deltas[i]) * cap_slope<CAPPED>(capped, cap)));
      }
      UNROLL
      for (int d = 0; d < VALUE_TILES; d++) {
        RightTile<T> right;
        right.load(staged_dy + t * 16 * VALUE_STRIDE + d * 16, VALUE_STRIDE);
        multiply_tiles(dvalue_tiles[d], weights, right);
      }
      UNROLL
      for (int d = 0; d < TILES; d++) {
        RightTile<T> right;
        right.load(staged_queries + t * 16 * STRIDE + d * 16, STRIDE);
        multiply_tiles(dkey_tiles[d], dscores, right);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

UNROLL
for (int e = 0; e < TILE_ELEMENTS; e++) {
  const TilePlace place = tile_place(e, lane);
  const int key = my_keys + int(place.row);
  if (key >= keys_count) continue;
  UNROLL
  for (int t = 0; t < TILES; t++) {
    const int column = t * 16 + int(place.column);
    if (column < all_keys.size) {
      dkeys[all_keys.row(batch, key_head, key) + column] = T(dkey_tiles[t].value(e) * as_type<float>(SCALE));
    }
  }
  UNROLL
  for (int t = 0; t < VALUE_TILES; t++) {
    const int column = t * 16 + int(place.column);
    if (column < all_values.size) {
      dvalues[all_values.row(batch, key_head, key) + column] = T(dvalue_tiles[t].value(e));
    }
  }
}

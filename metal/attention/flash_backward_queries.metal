// The gradient of flash.metal by its queries, and by the slopes.
//
//   p  = exp(s - lse)
//   ds = p · (dy · vᵀ - delta)      delta = sum(dy · y) - dlse, for each query
//   dq = scale · cap'(..) · ds k    dslope = -sum(ds · |distance|)
//
// queries, keys, values, mask, slopes, query_starts, key_starts and the constants as in flash.metal; dy: the gradient of y,
// as y; lse, delta: [B, H, S] of float. dqueries: as queries; dslopes: [B, H, R] of float, for each query where ALIBI, else
// zero, R = 1.
// Grid: as for flash.metal. Threadgroup memory: KEYS · (SIZE + VALUE_SIZE + 2 · PAD) of T.

// ---- body ----
constexpr int STRIDE = SIZE + PAD;
constexpr int VALUE_STRIDE = VALUE_SIZE + PAD;
constexpr int THREADS = 32 * SIMDS;
constexpr int TILES = SIZE / 16;
constexpr int VALUE_TILES = VALUE_SIZE / 16;
constexpr bool CAPPED = SOFT_CAP != 0;
THREADGROUP_ARRAY(T, staged, [KEYS * (STRIDE + VALUE_STRIDE)]);
threadgroup T* staged_keys = staged;
threadgroup T* staged_values = staged + KEYS * STRIDE;

const Heads all_queries = heads_of<TOKEN_MAJOR>(queries_shape);
const Heads all_keys = heads_of<TOKEN_MAJOR>(keys_shape);
const Heads all_values = heads_of<TOKEN_MAJOR>(values_shape);
const Heads all_results = heads_of<TOKEN_MAJOR>(dy_shape);
const int rows = all_queries.length;
const int heads = all_queries.heads;
const int keys_count = all_keys.length;
const int index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const int key_head = head / (heads / all_keys.heads);
const int first_row = int(threadgroups_per_grid.x - 1 - threadgroup_position_in_grid.x) * 16 * SIMDS;
const int last_row = metal::min(first_row + 16 * SIMDS, rows) - 1;
const int my_rows = first_row + int(simdgroup_index_in_threadgroup) * 16;

const float cap = as_type<float>(SOFT_CAP);
const float scale = as_type<float>(SCALE) * (CAPPED ? 1.0f : M_LOG2E_F);
const int segments = SEGMENTED ? query_starts_shape[0] - 1 : 0;
const float slope = ALIBI ? M_LOG2E_F * slopes[(slopes_shape[0] == 1 ? 0 : batch) * heads + head] : 0.0f;

const bool whole_queries = SIZE == all_queries.size && begins_a_chunk(queries);
const bool whole_results = VALUE_SIZE == all_results.size && begins_a_chunk(dy);
constexpr int AT_ONCE = KEYS / 16 < SIMDS ? KEYS / 16 : SIMDS;
Tile<T> query_tiles[TILES];
Tile<T> dy_tiles[VALUE_TILES];
for (int turn = 0; turn < SIMDS; turn += AT_ONCE) {
  const int first = first_row + turn * 16;
  stage_rows<T, 16 * AT_ONCE, SIZE, STRIDE, THREADS>(
      staged_keys, queries, all_queries, batch, head, first, whole_queries, index);
  stage_rows<T, 16 * AT_ONCE, VALUE_SIZE, VALUE_STRIDE, THREADS>(
      staged_values, dy, all_results, batch, head, first, whole_results, index);
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int place = int(simdgroup_index_in_threadgroup) - turn;
  if (place >= 0 && place < AT_ONCE) {
    UNROLL
    for (int t = 0; t < TILES; t++) query_tiles[t].load(staged_keys + place * 16 * STRIDE + t * 16, STRIDE);
    UNROLL
    for (int t = 0; t < VALUE_TILES; t++) {
      dy_tiles[t].load(staged_values + place * 16 * VALUE_STRIDE + t * 16, VALUE_STRIDE);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

Sight sights[2];
float bases[2];
float deltas[2];
float slope_sums[2] = {0.0f, 0.0f};
UNROLL
for (int half = 0; half < 2; half++) {
  const int row = metal::min(my_rows + int(tile_place(0, lane).row) + half * TILE_HALVES_APART, rows - 1);
  const size_t at = (size_t(batch) * heads + head) * rows + row;
  sights[half] = sight_of<LEFT, RIGHT, SEGMENTED>(row, rows, keys_count, query_starts, key_starts, segments);
  bases[half] = base_of(M_LOG2E_F * lse[at]);
  deltas[half] = delta[at];
}
const Sight top = sight_of<LEFT, RIGHT, SEGMENTED>(first_row, rows, keys_count, query_starts, key_starts, segments);
const Sight bottom = sight_of<LEFT, RIGHT, SEGMENTED>(last_row, rows, keys_count, query_starts, key_starts, segments);
const bool whole_keys = SIZE == all_keys.size && begins_a_chunk(keys);
const bool whole_values = VALUE_SIZE == all_values.size && begins_a_chunk(values);

Tile<float> gradients[TILES];
UNROLL
for (int t = 0; t < TILES; t++) gradients[t].fill(0.0f);

for (int start = top.first / KEYS * KEYS; start < bottom.last; start += KEYS) {
  stage_rows<T, KEYS, SIZE, STRIDE, THREADS>(staged_keys, keys, all_keys, batch, key_head, start, whole_keys, index);
  stage_rows<T, KEYS, VALUE_SIZE, VALUE_STRIDE, THREADS>(
      staged_values, values, all_values, batch, key_head, start, whole_values, index);
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const bool seen_by_all = start >= bottom.first && start + KEYS <= top.last;
  UNROLL
  for (int t = 0; t < KEYS / 16; t++) {
    Tile<float> scores;
    Tile<float> weights;
    scores.fill(0.0f);
    weights.fill(0.0f);
    UNROLL
    for (int d = 0; d < TILES; d++) {
      RightTile<T> right;
      right.load_transposed(staged_keys + t * 16 * STRIDE + d * 16, STRIDE);
      multiply_tiles(scores, query_tiles[d], right);
    }
    UNROLL
    for (int d = 0; d < VALUE_TILES; d++) {
      RightTile<T> right;
      right.load_transposed(staged_values + t * 16 * VALUE_STRIDE + d * 16, VALUE_STRIDE);
      multiply_tiles(weights, dy_tiles[d], right);
    }
    Tile<T> dscores;
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const int half = tile_half(e);
      const float capped = scaled_score<T, CAPPED>(scores.value(e), scale, cap);
      const TilePlace place = tile_place(e, lane);
      const int key = start + t * 16 + int(place.column);
      const float distance = distance_of(sights[half], key);
      float score = ALIBI ? capped - slope * distance : capped;
      if (MASKED || !seen_by_all) {
        const int row = metal::min(my_rows + int(place.row), rows - 1);
        score = seen_score<MASKED>(score, sights[half], key, M_LOG2E_F, mask, mask_shape, batch, head, row);
      }
      const float ds = metal::fast::exp2(score - bases[half]) * (weights.value(e) - deltas[half]);
      if (ALIBI) slope_sums[half] -= ds * distance;
      dscores.set(e, T(ds * cap_slope<CAPPED>(capped, cap)));
    }
    UNROLL
    for (int d = 0; d < TILES; d++) {
      RightTile<T> right;
      right.load(staged_keys + t * 16 * STRIDE + d * 16, STRIDE);
      multiply_tiles(gradients[d], dscores, right);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

UNROLL
for (int t = 0; t < TILES; t++) {
  UNROLL
  for (int e = 0; e < TILE_ELEMENTS; e++) {
    const TilePlace place = tile_place(e, lane);
    const int row = my_rows + int(place.row);
    const int column = t * 16 + int(place.column);
    if (row < rows && column < all_queries.size) {
      dqueries[all_queries.row(batch, head, row) + column] = T(gradients[t].value(e) * as_type<float>(SCALE));
    }
  }
}
UNROLL
for (int half = 0; half < 2; half++) {
  const float sum = tile_row_sum(slope_sums[half]);
  const int row = my_rows + int(tile_place(0, lane).row) + half * TILE_HALVES_APART;
  if (tile_place(0, lane).column == 0 && row < (ALIBI ? rows : 1)) {
    dslopes[(size_t(batch) * heads + head) * (ALIBI ? rows : 1) + row] = sum;
  }
}

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
// Grid: groups of SIMDS simdgroups, one for 16 queries each: x for queries, y for heads, z for the batch.
// Threadgroup memory: BUFFERS · KEYS · (SIZE + VALUE_SIZE + 2 · PAD) of T; with two buffers, the keys and values of the next
// round arrive while those of this one are worked on.
// Dao et al., FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, 2022 (arXiv:2205.14135).

// ---- body ----
constexpr int STRIDE = SIZE + PAD;
constexpr int VALUE_STRIDE = VALUE_SIZE + PAD;
constexpr int THREADS = 32 * SIMDS;
constexpr int ROWS = 16 * SIMDS;
constexpr int TILES = SIZE / 16;
constexpr int VALUE_TILES = VALUE_SIZE / 16;
constexpr int KEY_TILES = KEYS / 16;
constexpr int BUFFER = KEYS * (STRIDE + VALUE_STRIDE);
THREADGROUP_ARRAY(T, staged, [BUFFERS * BUFFER]);

const Heads all_queries = heads_of<TOKEN_MAJOR>(queries_shape);
const Heads all_keys = heads_of<TOKEN_MAJOR>(keys_shape);
const Heads all_values = heads_of<TOKEN_MAJOR>(values_shape);
Heads all_results = all_queries;
all_results.size = all_values.size;
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
const int first_row = int(threadgroups_per_grid.x - 1 - threadgroup_position_in_grid.x) * ROWS;
const int last_row = metal::min(first_row + ROWS, rows) - 1;
const int my_rows = first_row + simdgroup * 16;
const int my_last_row = metal::min(my_rows + 16, rows) - 1;

const Measure measure = measure_of<SCALE, SOFT_CAP>(
    ALIBI ? slopes[(slopes_shape[0] == 1 ? 0 : batch) * heads + head] : 0.0f);
const float sink = SINKS ? M_LOG2E_F * sinks[head] : -INFINITY;
const int segments = SEGMENTED ? query_starts_shape[0] - 1 : 0;

// Queries come through threadgroup memory, as many at a time as there is room for.
constexpr int AT_ONCE = BUFFERS * BUFFER / (16 * STRIDE);
Tile<T> query_tiles[TILES];
for (int first = 0; first < SIMDS; first += AT_ONCE) {
  stage_rows<T, 16 * AT_ONCE, SIZE, STRIDE, THREADS>(
      staged, queries, all_queries, batch, head, first_row + first * 16,
      SIZE == all_queries.size && begins_a_chunk(queries), index);
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int place = simdgroup - first;
  if (place >= 0 && place < AT_ONCE) {
    UNROLL
    for (int t = 0; t < TILES; t++) query_tiles[t].load(staged + place * 16 * STRIDE + t * 16, STRIDE);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

Sight sights[2];
look<LEFT, RIGHT, SEGMENTED>(sights, my_rows, rows, keys_count, query_starts, key_starts, segments, lane);
Running running = nothing_seen();
Tile<float> results[VALUE_TILES];
UNROLL
for (int t = 0; t < VALUE_TILES; t++) results[t].fill(0.0f);

// The keys of the group, and of this simdgroup, go from what the top row sees first to what the bottom row sees last.
const Sight top = sight_of<LEFT, RIGHT, SEGMENTED>(
    metal::min(my_rows, rows - 1), rows, keys_count, query_starts, key_starts, segments);
const Sight bottom = sight_of<LEFT, RIGHT, SEGMENTED>(my_last_row, rows, keys_count, query_starts, key_starts, segments);
const int begin =
    sight_of<LEFT, RIGHT, SEGMENTED>(first_row, rows, keys_count, query_starts, key_starts, segments).first / KEYS * KEYS;
const int end = sight_of<LEFT, RIGHT, SEGMENTED>(last_row, rows, keys_count, query_starts, key_starts, segments).last;
const bool whole_keys = SIZE == all_keys.size && begins_a_chunk(keys);
const bool whole_values = VALUE_SIZE == all_values.size && begins_a_chunk(values);

for (int start = begin - (BUFFERS - 1) * KEYS; start < end; start += KEYS) {
  const int coming = start + (BUFFERS - 1) * KEYS;
  // What was begun in the last round is there, and what it worked on may be overwritten.
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
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
  if (start < begin || start + KEYS <= top.first || start >= bottom.last) continue;
  threadgroup T* staged_keys = staged + (BUFFERS == 2 ? start / KEYS % 2 : 0) * BUFFER;
  threadgroup T* staged_values = staged_keys + KEYS * STRIDE;

  Tile<float> scores[KEY_TILES];
  UNROLL
  for (int t = 0; t < KEY_TILES; t++) scores[t].fill(0.0f);
  UNROLL
  for (int d = 0; d < TILES; d++) {
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) {
      RightTile<T> right;
      right.load_transposed(staged_keys + t * 16 * STRIDE + d * 16, STRIDE);
      multiply_tiles(scores[t], query_tiles[d], right);
    }
  }

  Tile<T> weights[KEY_TILES];
  weigh_products<SOFT_CAP != 0, ALIBI, MASKED>(
      weights, running, results, scores, sights, top, bottom, measure, start, mask, mask_shape, batch, head, my_rows, rows,
      lane);
  UNROLL
  for (int t = 0; t < KEY_TILES; t++) {
    UNROLL
    for (int d = 0; d < VALUE_TILES; d++) {
      RightTile<T> right;
      right.load(staged_values + t * 16 * VALUE_STRIDE + d * 16, VALUE_STRIDE);
      multiply_tiles(results[d], weights[t], right);
    }
  }
}
conclude<T>(y, lse, running, results, sink, all_results, batch, head, my_rows, lane);

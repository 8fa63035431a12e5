// flash.metal for many queries of numbers of 16 bits, where there is room for both factors in threadgroup memory.
//
// queries, keys, values, mask, slopes, sinks, query_starts, key_starts, y, lse and constants: as there, but that SIZE and
// VALUE_SIZE are rounded up to 64, to at most 128.
// Grid: groups of two teams, as in team.metal, of 64 queries each: x for queries, y for heads, z for the batch. Where two
// groups share a core, the products of one go on while the other makes weights.
// Threadgroup memory: 128 · (2 · SIZE + VALUE_SIZE) of T.
// Shah et al., FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision, 2024 (arXiv:2407.08608).

#ifdef METAL_WARPGROUPS
// So many registers that a core has room for two groups, whatever the compiler would take.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)
#endif

// ---- body ----
constexpr int THREADS = 256;
constexpr int ROWS = 128;
constexpr int KEYS = 64;
constexpr int VALUE_TILES = VALUE_SIZE / 16;
constexpr int KEY_TILES = KEYS / 16;
constexpr int BUFFER = KEYS * (SIZE + VALUE_SIZE);
LARGE_THREADGROUP_ARRAY(T, staged, [2 * BUFFER + ROWS * SIZE]);

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
// Of all lanes, so that no compiler takes a branch by it for one within a simdgroup.
const int team = simd_broadcast(uint(simdgroup / 4), 0);
const int team_rows = first_row + team * 64;
const int my_rows = team_rows + simdgroup % 4 * 16;

const Measure measure = measure_of<SCALE, SOFT_CAP>(
    ALIBI ? slopes[(slopes_shape[0] == 1 ? 0 : batch) * heads + head] : 0.0f);
const float sink = SINKS ? M_LOG2E_F * sinks[head] : -INFINITY;
const int segments = SEGMENTED ? query_starts_shape[0] - 1 : 0;

Sight sights[2];
look<LEFT, RIGHT, SEGMENTED>(sights, my_rows, rows, keys_count, query_starts, key_starts, segments, lane);
Running running = nothing_seen();
Tile<float> results[VALUE_TILES];
UNROLL
for (int t = 0; t < VALUE_TILES; t++) results[t].fill(0.0f);

// The keys of the group, and of this team, go from what the top row sees first to what the bottom row sees last.
const Sight top = sight_of<LEFT, RIGHT, SEGMENTED>(
    metal::min(team_rows, rows - 1), rows, keys_count, query_starts, key_starts, segments);
const Sight bottom = sight_of<LEFT, RIGHT, SEGMENTED>(
    metal::min(team_rows + 63, rows - 1), rows, keys_count, query_starts, key_starts, segments);
const int begin =
    sight_of<LEFT, RIGHT, SEGMENTED>(first_row, rows, keys_count, query_starts, key_starts, segments).first / KEYS * KEYS;
const int end = sight_of<LEFT, RIGHT, SEGMENTED>(last_row, rows, keys_count, query_starts, key_starts, segments).last;
const bool whole_keys = all_keys.size % 8 == 0 && begins_a_chunk(keys);
const bool whole_values = all_values.size % 8 == 0 && begins_a_chunk(values);
threadgroup T* staged_queries = staged + 2 * BUFFER;
if (begin < end) {
  stage_panels<T, ROWS, SIZE, THREADS>(
      staged_queries, queries, all_queries, batch, head, first_row,
      all_queries.size % 8 == 0 && begins_a_chunk(queries), index);
}

for (int start = begin - KEYS; start < end; start += KEYS) {
  const int coming = start + KEYS;
  // What was begun in the last round is there, and what it worked on may be overwritten. Before the first nobody waits.
  if (start >= begin) {
    publish_copies();
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (coming < end) {
    threadgroup T* target = staged + coming / KEYS % 2 * BUFFER;
    stage_panels<T, KEYS, SIZE, THREADS>(target, keys, all_keys, batch, key_head, coming, whole_keys, index);
    stage_panels<T, KEYS, VALUE_SIZE, THREADS>(
        target + KEYS * SIZE, values, all_values, batch, key_head, coming, whole_values, index);
  }
  if (start < begin || start + KEYS <= top.first || start >= bottom.last) continue;
  threadgroup T* staged_keys = staged + start / KEYS % 2 * BUFFER;
  threadgroup T* staged_values = staged_keys + KEYS * SIZE;

  Tile<float> scores[KEY_TILES];
  multiply_rows<T, ROWS, KEYS, SIZE>(scores, staged_queries + team * 64 * 64, staged_keys, simdgroup % 4);

  Tile<T> weights[KEY_TILES];
  weigh_products<SOFT_CAP != 0, ALIBI, MASKED>(
      weights, running, results, scores, sights, top, bottom, measure, start, mask, mask_shape, batch, head, my_rows, rows,
      lane);
  multiply_weights<T, KEYS, VALUE_SIZE>(results, weights, staged_values);
}
conclude<T>(y, lse, running, results, sink, all_results, batch, head, my_rows, lane);

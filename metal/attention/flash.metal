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
// to 16. KEYS at a time are worked on, a multiple of 16. TALL: tiles of 16 queries of a simdgroup; what is loaded of keys
// and values is loaded for all of them.
// Grid: groups of SIMDS simdgroups, one for 16 · TALL queries each: x for queries, y for heads, z for the batch.
// Threadgroup memory: BUFFERS · KEYS · (SIZE + VALUE_SIZE + 2 · PAD) of T; with two buffers, the keys and values of the next
// round arrive while those of this one are worked on. Where TALL is above one, there are no registers for queries, and
// 16 · TALL · SIMDS · (SIZE + PAD) of T besides.
// Dao et al., FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness, 2022 (arXiv:2205.14135).

// Products of queries and keys, capped, as shares of the cap.
template <typename T, int COUNT>
METAL_FUNC void cap_products(thread Tile<float> (&scores)[COUNT], float scale) {
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) scores[t].set(e, tanh_of<T>(scores[t].value(e) * scale));
  }
}

// Lessens scores by how far the keys from `start` on are from the diagonals of their rows.
template <int COUNT>
METAL_FUNC void lean(
    thread Tile<float> (&scores)[COUNT], thread const Sight (&sights)[2], float fall, int start, uint lane) {
  const int first = tile_place(0, lane).column;
  float away[2];
  for (int half = 0; half < 2; half++) away[half] = float(sights[half].diagonal - start - first);
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const float beyond = float(t * 16 + int(tile_place(e, lane).column) - first);
      scores[t].set(e, metal::fma(-fall, metal::fabs(away[tile_half(e)] - beyond), scores[t].value(e)));
    }
  }
}

// ---- body ----
constexpr int STRIDE = SIZE + PAD;
constexpr int VALUE_STRIDE = VALUE_SIZE + PAD;
constexpr int THREADS = 32 * SIMDS;
constexpr int TILES = SIZE / 16;
constexpr int VALUE_TILES = VALUE_SIZE / 16;
constexpr int KEY_TILES = KEYS / 16;
constexpr int ROWS = 16 * TALL;  // of a simdgroup
constexpr int BUFFER = KEYS * (STRIDE + VALUE_STRIDE);
constexpr bool STAYS = TALL > 1;  // what was staged of queries
constexpr bool CAPPED = SOFT_CAP != 0;
// Weights may grow to two to this before the sums are rescaled.
constexpr float GROWTH = 8.0f;
LARGE_THREADGROUP_ARRAY(T, staged, [BUFFERS * BUFFER + (STAYS ? SIMDS * ROWS * STRIDE : 0)]);
threadgroup T* staged_queries = staged + (STAYS ? BUFFERS * BUFFER : 0);

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
const int my_last_row = metal::min(my_rows + ROWS, rows) - 1;

// A score in units of log2(e) is `rate` times what is held of it, plus `shifts` of its row: so both are applied together
// with what is subtracted, in one instruction.
const float cap = as_type<float>(SOFT_CAP);
const float scale = as_type<float>(SCALE);
const float rate = M_LOG2E_F * (CAPPED ? cap : scale);
const float cap_scale = CAPPED ? scale / cap : 1.0f;
const float slope = ALIBI ? M_LOG2E_F * slopes[(slopes_shape[0] == 1 ? 0 : batch) * heads + head] : 0.0f;
const float fall = slope / rate;
const float first_fall = fall * float(tile_place(0, lane).column);
const int segments = SEGMENTED ? query_starts_shape[0] - 1 : 0;

// Queries come through threadgroup memory, and if they leave it for registers, then as many at a time as there is room for.
constexpr int AT_ONCE = STAYS ? SIMDS * TALL : BUFFERS * BUFFER / (16 * STRIDE);
Tile<T> query_tiles[STAYS ? 1 : TILES];
for (int first = 0; first < SIMDS * TALL; first += AT_ONCE) {
  stage_rows<T, 16 * AT_ONCE, SIZE, STRIDE, THREADS>(
      staged_queries, queries, all_queries, batch, head, first_row + first * 16,
      SIZE == all_queries.size && begins_a_chunk(queries), index);
  if (STAYS) break;
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int place = simdgroup - first;
  if (place >= 0 && place < AT_ONCE) {
    UNROLL
    for (int t = 0; t < TILES; t++) query_tiles[STAYS ? 0 : t].load(staged + place * 16 * STRIDE + t * 16, STRIDE);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
staged_queries += simdgroup * ROWS * STRIDE;

// Of the two rows that a lane has of each tile.
Sight sights[TALL][2];
float most[TALL][2];
float sums[TALL][2];
Tile<float> results[TALL][VALUE_TILES];
UNROLL
for (int m = 0; m < TALL; m++) {
  UNROLL
  for (int half = 0; half < 2; half++) {
    const int row = my_rows + 16 * m + int(tile_place(0, lane).row) + half * TILE_HALVES_APART;
    sights[m][half] = sight_of<LEFT, RIGHT, SEGMENTED>(
        metal::min(row, rows - 1), rows, keys_count, query_starts, key_starts, segments);
    most[m][half] = -INFINITY;
    sums[m][half] = 0.0f;
  }
  UNROLL
  for (int t = 0; t < VALUE_TILES; t++) results[m][t].fill(0.0f);
}

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

  // Of keys that are all before the diagonal, ALiBi is the sum of what begins the products and of a row's shift.
  const bool before = ALIBI && !CAPPED && start + KEYS <= top.diagonal + 1;
  Tile<float> scores[TALL][KEY_TILES];
  UNROLL
  for (int m = 0; m < TALL; m++) {
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) {
      scores[m][t].fill(0.0f);
      if (before) {
        UNROLL
        for (int e = 0; e < TILE_ELEMENTS; e++) {
          const int beyond = t * 16 + int(tile_place(e, lane).column - tile_place(0, lane).column);
          scores[m][t].set(e, metal::fma(fall, float(beyond), first_fall));
        }
      }
    }
  }
  UNROLL
  for (int d = 0; d < TILES; d++) {
    Tile<T> left[TALL];
    UNROLL
    for (int m = 0; m < TALL; m++) {
      left[m] = query_tiles[STAYS ? 0 : d];
      if (STAYS) left[m].load(staged_queries + m * 16 * STRIDE + d * 16, STRIDE);
    }
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) {
      RightTile<T> right;
      right.load_transposed(staged_keys + t * 16 * STRIDE + d * 16, STRIDE);
      UNROLL
      for (int m = 0; m < TALL; m++) multiply_tiles(scores[m][t], left[m], right);
    }
  }

  float shifts[TALL][2];
  UNROLL
  for (int m = 0; m < TALL; m++) {
    for (int half = 0; half < 2; half++) {
      shifts[m][half] = before ? slope * float(start - sights[m][half].diagonal) : 0.0f;
    }
    if (CAPPED) cap_products<T>(scores[m], cap_scale);
    if (ALIBI && !before) lean(scores[m], sights[m], fall, start, lane);
  }
  const bool seen_by_all = start >= bottom.first && start + KEYS <= top.last;
  if (MASKED || !seen_by_all) {
    UNROLL
    for (int m = 0; m < TALL; m++) {
      UNROLL
      for (int t = 0; t < KEY_TILES; t++) {
        UNROLL
        for (int e = 0; e < TILE_ELEMENTS; e++) {
          const TilePlace place = tile_place(e, lane);
          const int key = start + t * 16 + int(place.column);
          const int row = metal::min(my_rows + 16 * m + int(place.row), rows - 1);
          const float score = scores[m][t].value(e);
          scores[m][t].set(
              e, seen_score<MASKED>(
                     score, sights[m][tile_half(e)], key, M_LOG2E_F / rate, mask, mask_shape, batch, head, row));
        }
      }
    }
  }

  float highest[TALL][2];
  bool grown = false;
  UNROLL
  for (int m = 0; m < TALL; m++) {
    for (int half = 0; half < 2; half++) highest[m][half] = -INFINITY;
    UNROLL
    for (int t = 0; t < KEY_TILES; t++) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) {
        highest[m][tile_half(e)] = metal::max(highest[m][tile_half(e)], scores[m][t].value(e));
      }
    }
    UNROLL
    for (int half = 0; half < 2; half++) {
      highest[m][half] = metal::fma(rate, tile_row_max(highest[m][half]), shifts[m][half]);
      grown |= highest[m][half] > most[m][half] + GROWTH;
    }
  }
  if (simd_any(grown)) {
    UNROLL
    for (int m = 0; m < TALL; m++) {
      float rescale[2];
      UNROLL
      for (int half = 0; half < 2; half++) {
        const float above = metal::max(most[m][half], highest[m][half]);
        rescale[half] = metal::fast::exp2(most[m][half] - base_of(above));
        most[m][half] = above;
        sums[m][half] *= rescale[half];
      }
      UNROLL
      for (int t = 0; t < VALUE_TILES; t++) {
        UNROLL
        for (int e = 0; e < TILE_ELEMENTS; e++) results[m][t].set(e, results[m][t].value(e) * rescale[tile_half(e)]);
      }
    }
  }

  UNROLL
  for (int m = 0; m < TALL; m++) {
    UNROLL
    for (int half = 0; half < 2; half++) shifts[m][half] -= base_of(most[m][half]);
  }
  UNROLL
  for (int t = 0; t < KEY_TILES; t++) {
    Tile<T> weights[TALL];
    UNROLL
    for (int m = 0; m < TALL; m++) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) {
        const int half = tile_half(e);
        const float weight = metal::fast::exp2(metal::fma(scores[m][t].value(e), rate, shifts[m][half]));
        sums[m][half] += weight;
        weights[m].set(e, T(weight));
      }
    }
    UNROLL
    for (int d = 0; d < VALUE_TILES; d++) {
      RightTile<T> right;
      right.load(staged_values + t * 16 * VALUE_STRIDE + d * 16, VALUE_STRIDE);
      UNROLL
      for (int m = 0; m < TALL; m++) multiply_tiles(results[m][d], weights[m], right);
    }
  }
}

Heads all_results = all_queries;
all_results.size = all_values.size;
UNROLL
for (int m = 0; m < TALL; m++) {
  float factors[2];
  UNROLL
  for (int half = 0; half < 2; half++) {
    float sum = tile_row_sum(sums[m][half]);
    float base = base_of(most[m][half]);
    float factor = 1.0f;
    if (SINKS) {
      const float sink = M_LOG2E_F * sinks[head];
      base = base_of(metal::max(most[m][half], sink));
      factor = metal::fast::exp2(most[m][half] - base);
      sum = sum * factor + metal::fast::exp2(sink - base);
    }
    factors[half] = sum == 0.0f ? 0.0f : factor / sum;
    const int row = my_rows + 16 * m + int(tile_place(0, lane).row) + half * TILE_HALVES_APART;
    if (row < rows && tile_place(0, lane).column == 0) {
      lse[(size_t(batch) * heads + head) * rows + row] = sum == 0.0f ? -INFINITY : M_LN2_F * (base + metal::log2(sum));
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
        y[all_results.row(batch, head, row) + column] = T(results[m][t].value(e) * factors[tile_half(e)]);
      }
    }
  }
}

// What queries read of states that fade and grow by outer products, without a tensor of states or of scores.
//
//   S    = exp(decay) · S + step · v kᵀ                                      [V, K] a step, float
//   y    = SCALE · S q, + skip · v where SKIPS, · silu(gate) where GATED     of T
//   last = S after the last step
//
// queries, keys: [B, L, G, K] of T; values: [B, L, H, V] of T, whose head h reads group h / (H / G); decays, steps: [B, H, L]
// of float, steps read where STEPPED, else 1; state: [B, H, V, K] of float, flat, the first S where STARTED, else 0; skip:
// [H, V] of float, flat; gate: as values, flat, of Z. y: as values; last: [B, H, V, K].
// SCALE: bits of a float. SIZE: K rounded up to 16. A chunk has STEPS steps, 16 or 32. Within one, queries meet keys directly;
// from chunk to chunk S stays in registers as [V, K], so that it is a left factor as it is, and queries and keys are right
// ones: a simdgroup has 16 of its rows.
// Grid: groups of SIMDS simdgroups: x for rows of S, y for heads, z for the batch.
// Threadgroup memory: BUFFERS · STEPS · (2 · (SIZE + PAD) + 16 · SIMDS + PAD) + STEPS · (STEPS + PAD) of T. PAD keeps the columns
// of its rows in different banks. With two buffers, the next chunk arrives while this one is worked on.
// Dao and Gu, Transformers are SSMs, 2024 (arXiv:2405.21060).

// A number for each of a lane's columns of a tile.
struct OfColumns {
  float at[4];
};

// From `value`, of which the lane of each column has its own; the tile's first is `first`.
METAL_FUNC OfColumns of_columns(float value, int first, uint lane) {
  OfColumns all;
  UNROLL
  for (int e = 0; e < TILE_ELEMENTS; e++) {
    if (tile_half(e) == 0) all.at[tile_column(e)] = simd_shuffle(value, ushort(first + tile_place(e, lane).column));
  }
  return all;
}

// What is left of a number, by the logarithm of that.
template <typename T>
METAL_FUNC float left_by(float logarithm) {
  return sizeof(T) == 2 ? metal::fast::exp2(M_LOG2E_F * logarithm) : metal::exp(logarithm);
}

// ---- body ----
constexpr int STRIDE = SIZE + PAD;
constexpr int ROWS = 16 * SIMDS;
constexpr int VALUE_STRIDE = ROWS + PAD;
constexpr int WEIGHT_STRIDE = STEPS + PAD;
constexpr int THREADS = 32 * SIMDS;
constexpr int TILES = SIZE / 16;
constexpr int STEP_TILES = STEPS / 16;
// Of tiles of queries with those of keys that are not after them.
constexpr int PAIRS = STEP_TILES * (STEP_TILES + 1) / 2;
constexpr int BUFFER = STEPS * (2 * STRIDE + VALUE_STRIDE);
THREADGROUP_ARRAY(T, staged, [BUFFERS * BUFFER]);
THREADGROUP_ARRAY(T, weights, [STEPS * WEIGHT_STRIDE]);

const Heads all_keys = heads_of<true>(keys_shape);
const Heads all_values = heads_of<true>(values_shape);
const int length = all_values.length;
const int index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simdgroup = simdgroup_index_in_threadgroup;
const int head = threadgroup_position_in_grid.y;
const int batch = threadgroup_position_in_grid.z;
const int group = head / (all_values.heads / all_keys.heads);
const int first_row = int(threadgroup_position_in_grid.x) * ROWS;
const int my_rows = first_row + simdgroup * 16;
const size_t matrix = size_t(batch) * all_values.heads + head;
const size_t first_step = matrix * length;
const bool whole_keys = SIZE == all_keys.size && begins_a_chunk(keys) && begins_a_chunk(queries);
const bool whole_values = all_values.size % ROWS == 0 && begins_a_chunk(values);
const auto my_values = values + all_values.row(batch, head, 0) + first_row;
const size_t value_step = all_values.row(0, 0, 1);
const float scale = as_type<float>(SCALE);

Tile<float> states[TILES];
UNROLL
for (int n = 0; n < TILES; n++) {
  states[n].fill(0.0f);
  if (STARTED) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const TilePlace place = tile_place(e, lane);
      const int row = my_rows + int(place.row);
      const int column = n * 16 + int(place.column);
      if (row < all_values.size && column < all_keys.size) {
        states[n].set(e, state[(matrix * all_values.size + row) * all_keys.size + column]);
      }
    }
  }
}

float coming_decay = 0.0f;
float coming_step = 0.0f;
for (int start = -(BUFFERS - 1) * STEPS; start < length; start += STEPS) {
  const int coming = start + (BUFFERS - 1) * STEPS;
  float decay = coming_decay;
  float step = coming_step;
  // What was begun in the last round is there, and what it worked on may be overwritten.
  finish_copies();
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (coming < length) {
    threadgroup T* target = staged + (BUFFERS == 2 ? coming / STEPS % 2 : 0) * BUFFER;
    stage_rows<T, STEPS, SIZE, STRIDE, THREADS>(target, queries, all_keys, batch, group, coming, whole_keys, index);
    stage_rows<T, STEPS, SIZE, STRIDE, THREADS>(
        target + STEPS * STRIDE, keys, all_keys, batch, group, coming, whole_keys, index);
    if (whole_values) {
      stage_chunks<T, true, STEPS, ROWS, VALUE_STRIDE, THREADS>(
          target + 2 * STEPS * STRIDE, my_values, value_step, length, all_values.size - first_row, coming, index);
    } else {
      stage_chunks<T, false, STEPS, ROWS, VALUE_STRIDE, THREADS>(
          target + 2 * STEPS * STRIDE, my_values, value_step, length, all_values.size - first_row, coming, index);
    }
    const bool real = lane < STEPS && coming + lane < length;
    coming_decay = real ? decays[first_step + coming + lane] : 0.0f;
    coming_step = !real ? 0.0f : STEPPED ? steps[first_step + coming + lane] : 1.0f;
  }
  if (BUFFERS == 1) {
    decay = coming_decay;
    step = coming_step;
    finish_copies();
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (start < 0) continue;

  threadgroup T* my_queries = staged + (BUFFERS == 2 ? start / STEPS % 2 : 0) * BUFFER;
  threadgroup T* my_keys = my_queries + STEPS * STRIDE;
  threadgroup T* my_chunk = my_keys + STEPS * STRIDE + simdgroup * 16;
  // Of logarithms, from the start of the chunk; a lane has a step.
  const float sum = simd_prefix_inclusive_sum(decay);
  const float total = simd_shuffle(sum, ushort(STEPS - 1));

  for (int pair = simdgroup; pair < PAIRS; pair += SIMDS) {
    const int row = (pair + 1) / 2;
    const int column = pair / 2;
    Tile<float> scores;
    scores.fill(0.0f);
    UNROLL
    for (int n = 0; n < TILES; n++) {
      Tile<T> left;
      RightTile<T> right;
      left.load(my_queries + row * 16 * STRIDE + n * 16, STRIDE);
      right.load_transposed(my_keys + column * 16 * STRIDE + n * 16, STRIDE);
      multiply_tiles(scores, left, right);
    }
    const OfColumns sums = of_columns(sum, column * 16, lane);
    const OfColumns added = of_columns(step * scale, column * 16, lane);
    float sums_of_rows[2];
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      if (tile_column(e) == 0) {
        sums_of_rows[tile_half(e)] = simd_shuffle(sum, ushort(row * 16 + tile_place(e, lane).row));
      }
    }
    Tile<T> left_of_keys;
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const TilePlace place = tile_place(e, lane);
      const bool seen = row > column || place.row >= place.column;
      const float left = left_by<T>(sums_of_rows[tile_half(e)] - sums.at[tile_column(e)]);
      left_of_keys.set(e, seen ? T(scores.value(e) * left * added.at[tile_column(e)]) : T(0.0f));
    }
    left_of_keys.store(weights + row * 16 * WEIGHT_STRIDE + column * 16, WEIGHT_STRIDE);
  }

  // Of the states as they were before the chunk.
  Tile<float> reads[STEP_TILES];
  UNROLL
  for (int i = 0; i < STEP_TILES; i++) reads[i].fill(0.0f);
  UNROLL
  for (int n = 0; n < TILES; n++) {
    Tile<T> left;
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) left.set(e, T(states[n].value(e)));
    UNROLL
    for (int i = 0; i < STEP_TILES; i++) {
      RightTile<T> right;
      right.load_transposed(my_queries + i * 16 * STRIDE + n * 16, STRIDE);
      multiply_tiles(reads[i], left, right);
    }
  }
  const float left_of_state = scale * left_by<T>(sum);
  UNROLL
  for (int i = 0; i < STEP_TILES; i++) {
    const OfColumns left = of_columns(left_of_state, i * 16, lane);
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) reads[i].set(e, reads[i].value(e) * left.at[tile_column(e)]);
  }

  Tile<T> chunk[STEP_TILES];
  UNROLL
  for (int i = 0; i < STEP_TILES; i++) {
    chunk[i].load_transposed(my_chunk + i * 16 * VALUE_STRIDE, VALUE_STRIDE);
    if (start + STEPS > length) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) {
        if (start + i * 16 + int(tile_place(e, lane).column) >= length) chunk[i].set(e, T(0.0f));
      }
    }
  }

  const float left_at_end = step * left_by<T>(total - sum);
  const float through = left_by<T>(total);
  Tile<T> grown[STEP_TILES];
  UNROLL
  for (int i = 0; i < STEP_TILES; i++) {
    const OfColumns left = of_columns(left_at_end, i * 16, lane);
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) grown[i].set(e, T(float(chunk[i].value(e)) * left.at[tile_column(e)]));
  }
  UNROLL
  for (int n = 0; n < TILES; n++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) states[n].set(e, states[n].value(e) * through);
    UNROLL
    for (int i = 0; i < STEP_TILES; i++) {
      RightTile<T> right;
      right.load(my_keys + i * 16 * STRIDE + n * 16, STRIDE);
      multiply_tiles(states[n], grown[i], right);
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int i = 0; i < STEP_TILES; i++) {
    UNROLL
    for (int j = 0; j <= i; j++) {
      RightTile<T> right;
      right.load_transposed(weights + i * 16 * WEIGHT_STRIDE + j * 16, WEIGHT_STRIDE);
      multiply_tiles(reads[i], chunk[j], right);
    }
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const TilePlace place = tile_place(e, lane);
      const int row = my_rows + int(place.row);
      const int token = start + i * 16 + int(place.column);
      if (row >= all_values.size || token >= length) continue;
      const size_t at = all_values.row(batch, head, token) + row;
      float read = reads[i].value(e);
      if (SKIPS) read += skip[size_t(head) * all_values.size + row] * float(chunk[i].value(e));
      if (GATED) read *= float(gate[at]) * sigmoid_of(float(gate[at])).value;
      y[at] = T(read);
    }
  }
}

UNROLL
for (int n = 0; n < TILES; n++) {
  UNROLL
  for (int e = 0; e < TILE_ELEMENTS; e++) {
    const TilePlace place = tile_place(e, lane);
    const int row = my_rows + int(place.row);
    const int column = n * 16 + int(place.column);
    if (row < all_values.size && column < all_keys.size) {
      last[(matrix * all_values.size + row) * all_keys.size + column] = states[n].value(e);
    }
  }
}

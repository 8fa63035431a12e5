// Root-mean-square normalization of each head of queries and keys, then rotary embedding, in one pass over memory.
//
//   n = x / sqrt(mean(x^2) + EPS) * w     over a head, w = weight, or 1 + weight where UNIT_OFFSET
//   y = n turned as in rope_qk.metal      rounded once, at the end
//
// queries: [O, H, I, D] of T, keys: [O, K, I, D] of T, query_weight: [D] of V, key_weight: [D] of W; O, I, starts, turns,
// DIMS and MAGNITUDE as in rope_qk.metal. EPS: bits of a float. queries_turned, keys_turned: as queries and keys.
// A thread holds ROUNDS slots of each head in registers.
// Grid: groups of 128 threads, each of 128 / LANES units, LANES a power of two up to 32. Threadgroup memory: none.
// Henry et al., Query-Key Normalization for Transformers, 2020 (arXiv:2010.04245).

// Heads, `step` apart: each is read while the one before it is worked on. All threads of a simdgroup go through `most`,
// since they add up together.
template <typename T, bool WHOLE, int LANES, int ROUNDS, bool INTERLEAVED, typename Pointer>
METAL_FUNC void norm_and_turn_heads(
    Pointer x, device T* y, uint heads, uint most, size_t step, uint size, float eps,
    thread const Common<T, ROUNDS>& common) {
  Share<T> next[ROUNDS];
  UNROLL
  for (int round = 0; round < ROUNDS; round++) {
    if (heads > 0) next[round] = read_share<T, WHOLE>(x, common.spans[round]);
  }
  for (uint head = 0; head < most; head++) {
    Values<T> values[ROUNDS];
    float squares = 0.0f;
    UNROLL
    for (int round = 0; round < ROUNDS; round++) {
      if (head < heads) {
        values[round] = values_of<T>(next[round]);
        squares += product_of<T>(values[round], values[round]);
      }
      if (head + 1 < heads) {
        next[round] = read_share<T, WHOLE>(x + (head + 1) * step, common.spans[round]);
      }
    }
    const float scale = metal::rsqrt(sum_of_lanes<LANES>(squares) / float(size) + eps);
    UNROLL
    for (int round = 0; round < ROUNDS; round++) {
      if (head < heads) {
        UNROLL
        for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
          values[round].at[i] *= scale * common.factor[round].at[i];
        }
        if (common.turns[round]) {
          values[round] = turned<INTERLEAVED>(values[round], common.turn[round]);
        }
        write_share<T, WHOLE>(y + head * step, common.spans[round], share_of<T>(values[round]));
      }
    }
  }
}

template <
    typename T, typename W, int LANES, int ROUNDS, int DIMS, bool INTERLEAVED, typename Pointer, typename Weight,
    typename Turns>
METAL_FUNC void norm_and_turn_unit(
    Pointer x, Weight weight, device T* y, Unit unit, uint most, uint size, uint lane, int64_t position, Turns turns,
    float magnitude, Scaling scaling, bool whole) {
  Common<T, ROUNDS> common;
  UNROLL
  for (int round = 0; round < ROUNDS; round++) {
    const uint slot = lane + round * LANES;
    common.spans[round] = spans_of<T, DIMS, INTERLEAVED>(slot, size);
    common.turns[round] = slot < turning_slots<T, DIMS>();
    common.turn[round] = turn_of<T>(slot, DIMS / 2, position, turns, magnitude);
    common.factor[round] = factor_of<T, W>(weight, common.spans[round], scaling);
  }
  if (whole) {
    norm_and_turn_heads<T, true, LANES, ROUNDS, INTERLEAVED>(
        x + unit.first, y + unit.first, unit.heads, most, unit.step, size, scaling.eps, common);
  } else {
    norm_and_turn_heads<T, false, LANES, ROUNDS, INTERLEAVED>(
        x + unit.first, y + unit.first, unit.heads, most, unit.step, size, scaling.eps, common);
  }
}

// ---- body ----
const Extent queries_extent = extent_of(queries_shape);
const Extent keys_extent = extent_of(keys_shape);
const uint steps = queries_extent.outer * queries_extent.inner / starts_shape[0];
const float magnitude = as_type<float>(MAGNITUDE);
const Scaling scaling = scaling_of(EPS, UNIT_OFFSET);
const bool whole = has_whole_slots<T, DIMS>(queries_extent.size) && begins_a_chunk(queries) &&
    begins_a_chunk(keys) && begins_a_chunk(queries_turned) && begins_a_chunk(keys_turned);
const uint units_of_group = threads_per_threadgroup.x / LANES;
const uint place = thread_index_in_threadgroup / LANES;
const uint lane = thread_index_in_threadgroup % LANES;

const uint group = threadgroup_position_in_grid.x;
const uint query_groups = groups_of<HEADS>(queries_extent, units_of_group);
if (group < query_groups) {
  const Unit unit = unit_of<HEADS>(queries_extent, group * units_of_group + place);
  const int64_t position = position_of(unit.token, steps, starts);
  norm_and_turn_unit<T, V, LANES, ROUNDS, DIMS, INTERLEAVED>(
      queries, query_weight, queries_turned, unit, most_heads<HEADS>(queries_extent), queries_extent.size, lane,
      position, turns, magnitude, scaling, whole);
} else {
  const Unit unit = unit_of<HEADS>(keys_extent, (group - query_groups) * units_of_group + place);
  const int64_t position = position_of(unit.token, steps, starts);
  norm_and_turn_unit<T, W, LANES, ROUNDS, DIMS, INTERLEAVED>(
      keys, key_weight, keys_turned, unit, most_heads<HEADS>(keys_extent), keys_extent.size, lane, position, turns,
      magnitude, scaling, whole);
}

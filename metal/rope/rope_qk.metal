// Rotary embedding of queries and keys in one pass over memory.
//
//   (a, b) of pair i becomes MAGNITUDE * (a cos t - b sin t, a sin t + b cos t), t = 2 pi * position * turns[i] / 2^64
//
// queries: [O, H, I, D] of T, keys: [O, K, I, D] of T, O and I as in heads.metal; starts: [B] of int, the first position of
// each sequence; turns: [P] of ulong with P = DIMS / 2. Elements from DIMS on pass through. MAGNITUDE: bits of a float.
// queries_turned, keys_turned: as queries and keys. The gradient is the same kernel with every frequency negated.
// Grid: groups of 128 threads, each of 128 / LANES units. Threadgroup memory: none.
// Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021 (arXiv:2104.09864).

// Heads, `step` apart: each is read while the one before it is turned.
template <typename T, bool WHOLE, bool INTERLEAVED, typename Pointer>
METAL_FUNC void turn_heads(
    Pointer x, device T* y, uint heads, size_t step, Spans spans, bool turns, Turn<T> turn) {
  if (heads == 0) return;
  Share<T> next = read_share<T, WHOLE>(x, spans);
  for (uint head = 0; head < heads; head++) {
    Share<T> share = next;
    if (head + 1 < heads) next = read_share<T, WHOLE>(x + (head + 1) * step, spans);
    if (turns) share = share_of<T>(turned<INTERLEAVED>(values_of<T>(share), turn));
    write_share<T, WHOLE>(y + head * step, spans, share);
  }
}

template <typename T, int LANES, int DIMS, bool INTERLEAVED, typename Pointer, typename Turns>
METAL_FUNC void turn_unit(
    Pointer x, device T* y, Unit unit, uint size, uint lane, int64_t position, Turns turns, float magnitude,
    bool whole) {
  for (uint slot = lane; slot < slots_of<T, DIMS>(size); slot += LANES) {
    const Spans spans = spans_of<T, DIMS, INTERLEAVED>(slot, size);
    const bool turns_here = slot < turning_slots<T, DIMS>();
    const Turn<T> turn = turn_of<T>(slot, DIMS / 2, position, turns, magnitude);
    if (whole) {
      turn_heads<T, true, INTERLEAVED>(
          x + unit.first, y + unit.first, unit.heads, unit.step, spans, turns_here, turn);
    } else {
      turn_heads<T, false, INTERLEAVED>(
          x + unit.first, y + unit.first, unit.heads, unit.step, spans, turns_here, turn);
    }
  }
}

// ---- body ----
const Extent queries_extent = extent_of(queries_shape);
const Extent keys_extent = extent_of(keys_shape);
const uint steps = queries_extent.outer * queries_extent.inner / starts_shape[0];
const float magnitude = as_type<float>(MAGNITUDE);
const bool whole = has_whole_slots<T, DIMS>(queries_extent.size) && begins_a_chunk(queries) &&
    begins_a_chunk(keys) && begins_a_chunk(queries_turned) && begins_a_chunk(keys_turned);
const uint units_of_group = threads_per_threadgroup.x / LANES;
const uint place = thread_index_in_threadgroup / LANES;
const uint lane = thread_index_in_threadgroup % LANES;
if (place >= units_of_group) return;

const uint group = threadgroup_position_in_grid.x;
const uint query_groups = groups_of<HEADS>(queries_extent, units_of_group);
if (group < query_groups) {
  const Unit unit = unit_of<HEADS>(queries_extent, group * units_of_group + place);
  const int64_t position = position_of(unit.token, steps, starts);
  turn_unit<T, LANES, DIMS, INTERLEAVED>(
      queries, queries_turned, unit, queries_extent.size, lane, position, turns, magnitude, whole);
} else {
  const Unit unit = unit_of<HEADS>(keys_extent, (group - query_groups) * units_of_group + place);
  const int64_t position = position_of(unit.token, steps, starts);
  turn_unit<T, LANES, DIMS, INTERLEAVED>(
      keys, keys_turned, unit, keys_extent.size, lane, position, turns, magnitude, whole);
}

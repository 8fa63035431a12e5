// What each piece of the last axis does as a whole: the first of two passes over few rows.
//
//   decays, values: [O, P] of f32, such that a piece takes a state h to decays · h + values, or to h ∘ values
//
// decay: [O, L] of A, read by strides, and not at all but for RULE 0; x: [O, L] of T, taken times decay where SCALED;
// bounds: [Q], where the P = Q - 1 pieces begin and end, from 0 to L. REVERSE: the last step comes first.
// A thread takes runs of 16 bytes of x.
// Grid: a simdgroup for each piece of each row. Threadgroup memory: none.

// ---- body ----
constexpr int SIZE = Chunk<T>::SIZE;
const uint length = x_shape[1];
const uint pieces = bounds_shape[0] - 1;
const uint lane = thread_index_in_simdgroup;
const uint team = threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
if (team >= uint(x_shape[0]) * pieces) return;
const uint row = team / pieces;
const uint piece = team % pieces;
const Runs runs = runs_of<SIZE>(bounds[piece], bounds[piece + 1]);
const size_t offset = size_t(row) * length;
const long decay_step = RULE == 0 ? decay_strides[1] : 0;
const long decay_offset = RULE == 0 ? long(row) * decay_strides[0] : 0;

Step whole = step_of(1.0f, nothing<RULE>());
for (uint tile = 0; tile < runs.count; tile += 32) {
  float steps[SIZE];
  float by[SIZE];
  load_run<REVERSE, T, SIZE>(steps, x + offset, 1, length, runs, tile + lane, nothing<RULE>());
  if (RULE == 0) {
    load_run<REVERSE, A, SIZE>(by, decay + decay_offset, decay_step, length, runs, tile + lane, 1.0f);
  }
  Step own = step_of(1.0f, nothing<RULE>());
  UNROLL
  for (int j = 0; j < SIZE; j++) {
    const float decay_of_step = RULE == 0 ? by[j] : 1.0f;
    own.decay *= decay_of_step;
    own.value = advance<RULE>(own.value, step_of(decay_of_step, steps[j] * (SCALED ? decay_of_step : 1.0f)));
  }
  // Only lane 31 has all of the tile.
  whole = joined<RULE>(whole, over_lanes<RULE>(own, lane));
}
if (lane == 31) {
  decays[team] = whole.decay;
  values[team] = whole.value;
}

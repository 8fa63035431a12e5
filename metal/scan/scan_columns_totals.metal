// What each piece of the middle axis does as a whole: the first of two passes over few rows.
//
//   decays, values: [O, P, I] of f32, such that a piece takes a state h to decays · h + values, or to h ∘ values
//
// decay: [O, L, I] of A, read by strides, and not at all but for RULE 0; x: [O, L, I] of T, taken times decay where SCALED;
// bounds: [Q], where the P = Q - 1 pieces begin and end, from 0 to L. REVERSE: the last step comes first.
// A thread takes WIDTH channels, which divides I, and STEPS steps at once, of a part of the piece that its simdgroup takes.
// Grid: a group of SIMDS simdgroups for each 32 · WIDTH channels of each piece of each row.
// Threadgroup memory: 256 · SIMDS · WIDTH bytes.

// ---- body ----
THREADGROUP_ARRAY(float, shared, [2 * SIMDS * 32 * WIDTH]);
const uint length = x_shape[1];
const uint channels = x_shape[2];
const uint pieces = bounds_shape[0] - 1;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Column column = column_of<WIDTH>(threadgroup_position_in_grid.x, lane, channels, pieces);
const uint channel = column.real ? column.channel : 0;
const Stretch stretch = stretch_of<REVERSE>(bounds[column.piece], bounds[column.piece + 1]);
const uint share = (stretch.count + SIMDS - 1) / SIMDS;
Stretch part = stretch;
part.first += stretch.by * int(simdgroup * share);
const uint left = simdgroup * share < stretch.count ? stretch.count - simdgroup * share : 0;
part.count = left < share ? left : share;
const size_t offset = size_t(column.row) * length * channels + channel;
const long decay_time = RULE == 0 ? decay_strides[1] : 0;
const long decay_channel = RULE == 0 ? decay_strides[2] : 0;
const long decay_offset = RULE == 0 ? long(column.row) * decay_strides[0] + long(channel) * decay_channel : 0;
const bool decay_whole = RULE == 0 && decay_channel == 1 && decay_time % WIDTH == 0 && in_packs<A, WIDTH>(decay + decay_offset);
const bool x_whole = in_packs<T, WIDTH>(x + offset);

Step total[WIDTH];
UNROLL
for (int i = 0; i < WIDTH; i++) total[i] = step_of(1.0f, nothing<RULE>());
for (uint tile = 0; tile < part.count; tile += STEPS) {
  Pack<T, WIDTH> steps[STEPS];
  Pack<A, WIDTH> by[STEPS];
  load_steps<T, WIDTH, STEPS>(steps, x + offset, channels, 1, x_whole, part, tile, column.real);
  if (RULE == 0) {
    load_steps<A, WIDTH, STEPS>(
        by, decay + decay_offset, decay_time, decay_channel, decay_whole, part, tile, column.real);
  }
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    if (tile + r < part.count) {
      UNROLL
      for (int i = 0; i < WIDTH; i++) {
        const float decay_of_step = RULE == 0 ? by[r].at(i) : 1.0f;
        const float value = steps[r].at(i) * (SCALED ? decay_of_step : 1.0f);
        total[i].decay *= decay_of_step;
        total[i].value = advance<RULE>(total[i].value, step_of(decay_of_step, value));
      }
    }
  }
}
tell<RULE, SIMDS, WIDTH>(total, shared, simdgroup, lane);
threadgroup_barrier(mem_flags::mem_threadgroup);
if (column.real && simdgroup == 0) {
  const size_t at = (size_t(column.row) * pieces + column.piece) * channels + channel;
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    Step whole = step_of(1.0f, nothing<RULE>());
    UNROLL
    for (int s = 0; s < SIMDS; s++) {
      const uint told = (s * WIDTH + i) * 32 + lane;
      whole = joined<RULE>(whole, step_of(RULE == 0 ? shared[SIMDS * WIDTH * 32 + told] : 1.0f, shared[told]));
    }
    decays[at + i] = whole.decay;
    values[at + i] = whole.value;
  }
}

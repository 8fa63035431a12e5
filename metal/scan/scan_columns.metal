// A scan along the middle axis, in pieces that each begin with a state of their own.
//
//   h = decay · h + x, or h = h ∘ x by another RULE      y: [O, L, I] of T, h after each step, before it where EXCLUSIVE
//                                                        last: [O, P, I] of f32, h after each piece
//
// decay: [O, L, I] of A, read by strides, and not at all but for RULE 0; x: [O, L, I] of T; state: [O, P, I] of f32, what
// each piece begins with; bounds: [P + 1], where pieces begin and end, from 0 to L. REVERSE: the last step comes first.
// A thread takes WIDTH channels, which divides I, and STEPS steps of a tile at once; the next tile is loaded meanwhile.
// Grid: a group of SIMDS simdgroups for each 32 · WIDTH channels of each piece of each row.
// Threadgroup memory: 512 · SIMDS · WIDTH bytes.

// ---- body ----
THREADGROUP_ARRAY(float, shared, [4 * SIMDS * 32 * WIDTH]);
const uint length = x_shape[1];
const uint channels = x_shape[2];
const uint pieces = state_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Column column = column_of<WIDTH>(threadgroup_position_in_grid.x, lane, channels, pieces);
const Stretch stretch = stretch_of<REVERSE>(bounds[column.piece], bounds[column.piece + 1]);
const uint channel = column.real ? column.channel : 0;
const size_t offset = size_t(column.row) * length * channels + channel;
const size_t state_offset = (size_t(column.row) * pieces + column.piece) * channels + channel;
const long decay_time = RULE == 0 ? decay_strides[1] : 0;
const long decay_channel = RULE == 0 ? decay_strides[2] : 0;
const long decay_offset = RULE == 0 ? long(column.row) * decay_strides[0] + long(channel) * decay_channel : 0;
const bool decay_whole = RULE == 0 && decay_channel == 1 && decay_time % WIDTH == 0 && in_packs<A, WIDTH>(decay + decay_offset);
const bool x_whole = in_packs<T, WIDTH>(x + offset);
const bool y_whole = in_packs<T, WIDTH>(y + offset);

float carry[WIDTH];
UNROLL
for (int i = 0; i < WIDTH; i++) carry[i] = state[state_offset + i];
Pack<T, WIDTH> values[STEPS];
Pack<A, WIDTH> decays[STEPS];
uint own = simdgroup * STEPS;
load_steps<T, WIDTH, STEPS>(values, x + offset, channels, 1, x_whole, stretch, own, column.real);
if (RULE == 0) {
  load_steps<A, WIDTH, STEPS>(
      decays, decay + decay_offset, decay_time, decay_channel, decay_whole, stretch, own, column.real);
}
uint turn = 0;
for (uint tile = 0; tile < stretch.count; tile += SIMDS * STEPS) {
  Step total[WIDTH];
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    total[i] = step_of(1.0f, nothing<RULE>());
    UNROLL
    for (int r = 0; r < STEPS; r++) {
      if (own + r < stretch.count) {
        const float decay_of_step = RULE == 0 ? decays[r].at(i) : 1.0f;
        total[i].decay *= decay_of_step;
        total[i].value = advance<RULE>(total[i].value, step_of(decay_of_step, values[r].at(i)));
      }
    }
  }
  // Of the two halves, one is read while the other is written.
  threadgroup float* const half_of_shared = shared + turn * (2 * SIMDS * 32 * WIDTH);
  tell<RULE, SIMDS, WIDTH>(total, half_of_shared, simdgroup, lane);
  const uint next = own + SIMDS * STEPS;
  Pack<T, WIDTH> next_values[STEPS];
  Pack<A, WIDTH> next_decays[STEPS];
  load_steps<T, WIDTH, STEPS>(next_values, x + offset, channels, 1, x_whole, stretch, next, column.real);
  if (RULE == 0) {
    load_steps<A, WIDTH, STEPS>(
        next_decays, decay + decay_offset, decay_time, decay_channel, decay_whole, stretch, next, column.real);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    hold_packed(values[r]);
    if (RULE == 0) hold_packed(decays[r]);
  }
  float h[WIDTH];
  hear<RULE, SIMDS, WIDTH>(h, carry, half_of_shared, simdgroup, lane);
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    T result[WIDTH];
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      const float decay_of_step = RULE == 0 ? decays[r].at(i) : 1.0f;
      const float after = advance<RULE>(h[i], step_of(decay_of_step, values[r].at(i)));
      result[i] = T(EXCLUSIVE ? h[i] : after);
      h[i] = after;
    }
    if (column.real && own + r < stretch.count) {
      const long time = stretch.first + long(own + r) * stretch.by;
      store_pack<T, WIDTH>(y + offset + time * channels, result, y_whole);
    }
    values[r] = next_values[r];
    if (RULE == 0) decays[r] = next_decays[r];
  }
  own = next;
  turn ^= 1;
}
if (column.real && simdgroup == 0) {
  UNROLL
  for (int i = 0; i < WIDTH; i++) last[state_offset + i] = carry[i];
}

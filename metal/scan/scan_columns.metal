// A scan along the middle axis, in pieces that each begin with a state of their own.
//
//   h = decay · h + x, or h = h ∘ x by another RULE      y: [O, L, I] of T, h after each step, before it where EXCLUSIVE
//                                                        last: [O, P, I] of f32, h after each piece
//
// decay: [O, L, I] of A, read by strides, and not at all but for RULE 0; x: [O, L, I] of T; state: [O, P, I] of f32,
// read by strides, what each piece begins with; bounds: [P + 1], where pieces begin and end, from 0 to L. REVERSE: the last step comes first.
// A thread takes WIDTH channels, which divides I, and STEPS steps of a tile at once; the next AHEAD tiles are loaded meanwhile.
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
const size_t last_offset = (size_t(column.row) * pieces + column.piece) * channels + channel;
const long began =
    long(column.row) * state_strides[0] + long(column.piece) * state_strides[1] + long(channel) * state_strides[2];
const long decay_time = RULE == 0 ? decay_strides[1] : 0;
const long decay_channel = RULE == 0 ? decay_strides[2] : 0;
const long decay_offset = RULE == 0 ? long(column.row) * decay_strides[0] + long(channel) * decay_channel : 0;
const bool decay_whole = RULE == 0 && decay_channel == 1 && decay_time % WIDTH == 0 && in_packs<A, WIDTH>(decay + decay_offset);
const bool x_whole = in_packs<T, WIDTH>(x + offset);
const bool y_whole = in_packs<T, WIDTH>(y + offset);

float carry[WIDTH];
UNROLL
for (int i = 0; i < WIDTH; i++) carry[i] = state[began + i * state_strides[2]];
// The tile at hand, and those that are loaded meanwhile.
Pack<T, WIDTH> values[AHEAD + 1][STEPS];
Pack<A, WIDTH> decays[AHEAD + 1][STEPS];
uint own = simdgroup * STEPS;
UNROLL
for (int n = 0; n < AHEAD; n++) {
  const uint first = own + n * SIMDS * STEPS;
  load_steps<T, WIDTH, STEPS>(values[n], x + offset, channels, 1, x_whole, stretch, first, column.real);
  if (RULE == 0) {
    load_steps<A, WIDTH, STEPS>(
        decays[n], decay + decay_offset, decay_time, decay_channel, decay_whole, stretch, first, column.real);
  }
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
        const float decay_of_step = RULE == 0 ? decays[0][r].at(i) : 1.0f;
        total[i].decay *= decay_of_step;
        total[i].value = advance<RULE>(total[i].value, step_of(decay_of_step, values[0][r].at(i)));
      }
    }
  }
  // Of the two halves, one is read while the other is written.
  threadgroup float* const half_of_shared = shared + turn * (2 * SIMDS * 32 * WIDTH);
  tell<RULE, SIMDS, WIDTH>(total, half_of_shared, simdgroup, lane);
  const uint later = own + AHEAD * SIMDS * STEPS;
  load_steps<T, WIDTH, STEPS>(values[AHEAD], x + offset, channels, 1, x_whole, stretch, later, column.real);
  if (RULE == 0) {
    load_steps<A, WIDTH, STEPS>(
        decays[AHEAD], decay + decay_offset, decay_time, decay_channel, decay_whole, stretch, later, column.real);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    hold_packed(values[0][r]);
    if (RULE == 0) hold_packed(decays[0][r]);
  }
  float h[WIDTH];
  hear<RULE, SIMDS, WIDTH>(h, carry, half_of_shared, simdgroup, lane);
  const long jump = long(stretch.by) * channels;
  size_t at = offset + long(stretch.first) * channels + long(own) * jump;
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    T result[WIDTH];
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      const float decay_of_step = RULE == 0 ? decays[0][r].at(i) : 1.0f;
      const float after = advance<RULE>(h[i], step_of(decay_of_step, values[0][r].at(i)));
      result[i] = T(EXCLUSIVE ? h[i] : after);
      h[i] = after;
    }
    if (column.real && own + r < stretch.count) {
      store_pack<T, WIDTH>(y + at, result, y_whole);
    }
    at += jump;
    UNROLL
    for (int n = 0; n < AHEAD; n++) {
      values[n][r] = values[n + 1][r];
      if (RULE == 0) decays[n][r] = decays[n + 1][r];
    }
  }
  own += SIMDS * STEPS;
  turn ^= 1;
}
if (column.real && simdgroup == 0) {
  UNROLL
  for (int i = 0; i < WIDTH; i++) last[last_offset + i] = carry[i];
}

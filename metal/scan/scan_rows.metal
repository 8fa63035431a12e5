// A scan along the last axis, in pieces that each begin with a state of their own.
//
//   h = decay · h + x, or h = h ∘ x by another RULE      y: [O, L] of T, h after each step, before it where EXCLUSIVE
//                                                        last: [O, P] of f32, h after each piece
//
// decay: [O, L] of A, read by strides, and not at all but for RULE 0; x: [O, L] of T; state: [O, P] of f32, what each piece
// begins with, read by strides; bounds: [P + 1], where pieces begin and end, from 0 to L. REVERSE: the last step comes first.
// A thread takes CHUNKS runs of 16 bytes of x at once; the next ones are loaded meanwhile.
// Grid: a team of SIMDS simdgroups for each piece of each row, which is a group unless SIMDS is 1.
// Threadgroup memory: 16 · CHUNKS · SIMDS bytes.

// ---- body ----
THREADGROUP_ARRAY(float, shared, [4 * CHUNKS * SIMDS]);
constexpr int SIZE = Chunk<T>::SIZE;
const uint length = x_shape[1];
const uint pieces = state_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = SIMDS > 1 ? simdgroup_index_in_threadgroup : 0;
const uint team = SIMDS > 1 ? threadgroup_position_in_grid.x
                            : threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
if (team >= uint(x_shape[0]) * pieces) return;
const uint row = team / pieces;
const uint piece = team % pieces;
const Runs runs = runs_of<SIZE>(bounds[piece], bounds[piece + 1]);
const size_t offset = size_t(row) * length;
const long decay_step = RULE == 0 ? decay_strides[1] : 0;
const long decay_offset = RULE == 0 ? long(row) * decay_strides[0] : 0;

float carry = state[long(row) * state_strides[0] + long(piece) * state_strides[1]];
float values[CHUNKS][SIZE];
float decays[CHUNKS][SIZE];
const uint own = simdgroup * 32 + lane;
UNROLL
for (int c = 0; c < CHUNKS; c++) {
  load_run<REVERSE, T, SIZE>(values[c], x + offset, 1, length, runs, own + c * SIMDS * 32, nothing<RULE>());
  if (RULE == 0) {
    load_run<REVERSE, A, SIZE>(decays[c], decay + decay_offset, decay_step, length, runs, own + c * SIMDS * 32, 1.0f);
  }
}
uint half_of_shared = 0;
for (uint tile = 0; tile < runs.count; tile += CHUNKS * SIMDS * 32) {
  Step lanes[CHUNKS];
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    lanes[c] = step_of(1.0f, nothing<RULE>());
    UNROLL
    for (int j = 0; j < SIZE; j++) {
      const float decay_of_step = RULE == 0 ? decays[c][j] : 1.0f;
      lanes[c].decay *= decay_of_step;
      lanes[c].value = advance<RULE>(lanes[c].value, step_of(decay_of_step, values[c][j]));
    }
  }
  threadgroup float* const told = shared + half_of_shared;
  tell_runs<RULE, SIMDS, CHUNKS>(lanes, told, simdgroup, lane);
  const uint next = tile + CHUNKS * SIMDS * 32 + own;
  float next_values[CHUNKS][SIZE];
  float next_decays[CHUNKS][SIZE];
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    load_run<REVERSE, T, SIZE>(next_values[c], x + offset, 1, length, runs, next + c * SIMDS * 32, nothing<RULE>());
    if (RULE == 0) {
      load_run<REVERSE, A, SIZE>(
          next_decays[c], decay + decay_offset, decay_step, length, runs, next + c * SIMDS * 32, 1.0f);
    }
  }
  if (SIMDS > 1) threadgroup_barrier(mem_flags::mem_threadgroup);
  float before[CHUNKS];
  hear_runs<RULE, SIMDS, CHUNKS>(before, carry, lanes, told, simdgroup, lane);
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    float h = before[c];
    float results[SIZE];
    UNROLL
    for (int j = 0; j < SIZE; j++) {
      const float after = advance<RULE>(h, step_of(RULE == 0 ? decays[c][j] : 1.0f, values[c][j]));
      results[j] = EXCLUSIVE ? h : after;
      h = after;
    }
    store_run<REVERSE, T, SIZE>(y + offset, results, runs, tile + own + c * SIMDS * 32);
    UNROLL
    for (int j = 0; j < SIZE; j++) {
      values[c][j] = next_values[c][j];
      if (RULE == 0) decays[c][j] = next_decays[c][j];
    }
  }
  half_of_shared = 2 * CHUNKS * SIMDS - half_of_shared;
}
if (simdgroup == 0 && lane == 0) last[team] = carry;

// The gradient of an affine scan along the last axis: an affine scan the other way.
//
// With h_t = decay_t · h_(t-1) + x_t and c the gradient of h_t that comes from later steps, going back from the last step:
//   dx_t = dy_t + c, then c = decay_t · dx_t            [O, L] of T
//   ddecay_t = dx_t · h_(t-1)                           [O, L] of A
// Where EXCLUSIVE, y_t is h_(t-1): dx_t = c, then c = decay_t · c + dy_t. In the end c is dstate, [O, P] of f32.
//
// decay: [O, L] of A, read by strides; y, dy: [O, L] of T; state: [O, P] of f32, read by strides, what the pieces of the
// scan began with; dlast: [O, P] of f32, the gradient of the states they ended with; bounds: [P + 1], where they begin and end.
// REVERSE: the last step comes first here, so that the scan was not reversed.
// A thread takes CHUNKS runs of 16 bytes of dy at once. Grid: a team of SIMDS simdgroups for each piece of each row, which
// is a group unless SIMDS is 1. Threadgroup memory: 16 · CHUNKS · SIMDS bytes.

// ---- body ----
THREADGROUP_ARRAY(float, shared, [4 * CHUNKS * SIMDS]);
constexpr int SIZE = Chunk<T>::SIZE;
const uint length = dy_shape[1];
const uint pieces = dlast_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = SIMDS > 1 ? simdgroup_index_in_threadgroup : 0;
const uint team = SIMDS > 1 ? threadgroup_position_in_grid.x
                            : threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
if (team >= uint(dy_shape[0]) * pieces) return;
const uint row = team / pieces;
const uint piece = team % pieces;
const Runs runs = runs_of<SIZE>(bounds[piece], bounds[piece + 1]);
const size_t offset = size_t(row) * length;
const long decay_step = decay_strides[1];
const long decay_offset = long(row) * decay_strides[0];

const float began = state[long(row) * state_strides[0] + long(piece) * state_strides[1]];

float carry = dlast[team];
const uint own = simdgroup * 32 + lane;
uint half_of_shared = 0;
for (uint tile = 0; tile < runs.count; tile += CHUNKS * SIMDS * 32) {
  float flows[CHUNKS][SIZE];
  float decays[CHUNKS][SIZE];
  float states[CHUNKS][SIZE];
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint place = tile + own + c * SIMDS * 32;
    load_run<REVERSE, T, SIZE>(flows[c], dy + offset, 1, length, runs, place, 0.0f);
    load_run<REVERSE, A, SIZE>(decays[c], decay + decay_offset, decay_step, length, runs, place, 1.0f);
    load_run<REVERSE, T, SIZE>(states[c], y + offset, 1, length, runs, place, 0.0f);
    if (!EXCLUSIVE && place < runs.count) {
      // The states after the steps before: one further on, and that of the piece before its first step.
      const uint first = element_of<REVERSE, SIZE>(runs, place);
      UNROLL
      for (int j = 0; j < SIZE; j++) {
        const uint element = REVERSE ? first + SIZE - 1 - j : first + j;
        const bool begins = REVERSE ? element == runs.begin : element + 1 == runs.end;
        if (begins) {
          states[c][j] = began;
        } else if (j + 1 < SIZE) {
          states[c][j] = states[c][j + 1 < SIZE ? j + 1 : 0];
        } else if (element >= runs.begin && element < runs.end) {
          states[c][j] = float(y[offset + (REVERSE ? element - 1 : element + 1)]);
        }
      }
    }
  }
  Step lanes[CHUNKS];
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    lanes[c] = step_of(1.0f, 0.0f);
    UNROLL
    for (int j = 0; j < SIZE; j++) {
      const float by = decays[c][j];
      lanes[c].decay *= by;
      lanes[c].value = EXCLUSIVE ? by * lanes[c].value + flows[c][j] : by * (lanes[c].value + flows[c][j]);
    }
  }
  threadgroup float* const told = shared + half_of_shared;
  tell_runs<0, SIMDS, CHUNKS>(lanes, told, simdgroup, lane);
  if (SIMDS > 1) threadgroup_barrier(mem_flags::mem_threadgroup);
  float before[CHUNKS];
  hear_runs<0, SIMDS, CHUNKS>(before, carry, lanes, told, simdgroup, lane);
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    float flow = before[c];
    float of_x[SIZE];
    float of_decay[SIZE];
    UNROLL
    for (int j = 0; j < SIZE; j++) {
      const float reached = EXCLUSIVE ? flow : flows[c][j] + flow;
      of_x[j] = reached;
      of_decay[j] = reached * states[c][j];
      flow = EXCLUSIVE ? decays[c][j] * flow + flows[c][j] : decays[c][j] * reached;
    }
    const uint place = tile + own + c * SIMDS * 32;
    store_run<REVERSE, T, SIZE>(dx + offset, of_x, runs, place);
    store_run<REVERSE, A, SIZE>(ddecay + offset, of_decay, runs, place);
  }
  half_of_shared = 2 * CHUNKS * SIMDS - half_of_shared;
}
if (simdgroup == 0 && lane == 0) dstate[team] = carry;

// The gradient of an affine scan along the middle axis: an affine scan the other way.
//
// With h_t = decay_t · h_(t-1) + x_t and c the gradient of h_t that comes from later steps, going back from the last step:
//   dx_t = dy_t + c, then c = decay_t · dx_t            [O, L, I] of T
//   ddecay_t = dx_t · h_(t-1)                           [O, L, I] of A
// Where EXCLUSIVE, y_t is h_(t-1): dx_t = c, then c = decay_t · c + dy_t. In the end c is dstate, [O, P, I] of f32.
//
// decay: [O, L, I] of A, read by strides; y, dy: [O, L, I] of T; state: [O, P, I] of f32, read by strides, what the pieces
// of the scan began with; dlast: [O, P, I] of f32, the gradient of the states they ended with; bounds: [P + 1], where they begin and end.
// REVERSE: the last step comes first here, so that the scan was not reversed.
// A thread takes WIDTH channels, which divides I, and STEPS steps of a tile at once; the next tile is loaded meanwhile.
// Grid: a group of SIMDS simdgroups for each 32 · WIDTH channels of each piece of each row.
// Threadgroup memory: 512 · SIMDS · WIDTH bytes.

// ---- body ----
THREADGROUP_ARRAY(float, shared, [4 * SIMDS * 32 * WIDTH]);
const uint length = dy_shape[1];
const uint channels = dy_shape[2];
const uint pieces = dlast_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Column column = column_of<WIDTH>(threadgroup_position_in_grid.x, lane, channels, pieces);
const Stretch stretch = stretch_of<REVERSE>(bounds[column.piece], bounds[column.piece + 1]);
const uint channel = column.real ? column.channel : 0;
const size_t offset = size_t(column.row) * length * channels + channel;
const size_t state_offset = (size_t(column.row) * pieces + column.piece) * channels + channel;
const long began =
    long(column.row) * state_strides[0] + long(column.piece) * state_strides[1] + long(channel) * state_strides[2];
const long decay_time = decay_strides[1];
const long decay_channel = decay_strides[2];
const long decay_offset = long(column.row) * decay_strides[0] + long(channel) * decay_channel;
const bool decay_whole = decay_channel == 1 && decay_time % WIDTH == 0 && in_packs<A, WIDTH>(decay + decay_offset);
const bool dy_whole = in_packs<T, WIDTH>(dy + offset);
const bool y_whole = in_packs<T, WIDTH>(y + offset);
const bool dx_whole = in_packs<T, WIDTH>(dx + offset);
const bool ddecay_whole = in_packs<A, WIDTH>(ddecay + offset);
// The states before steps: those beside them, or those after the steps before.
Stretch earlier = stretch;
if (!EXCLUSIVE) {
  earlier.first += earlier.by;
  earlier.count = stretch.count == 0 ? 0 : stretch.count - 1;
}

float carry[WIDTH];
UNROLL
for (int i = 0; i < WIDTH; i++) carry[i] = dlast[state_offset + i];
Pack<T, WIDTH> flows[STEPS];
Pack<T, WIDTH> states[STEPS];
Pack<A, WIDTH> decays[STEPS];
uint own = simdgroup * STEPS;
load_steps<T, WIDTH, STEPS>(flows, dy + offset, channels, 1, dy_whole, stretch, own, column.real);
load_steps<T, WIDTH, STEPS>(states, y + offset, channels, 1, y_whole, earlier, own, column.real);
load_steps<A, WIDTH, STEPS>(
    decays, decay + decay_offset, decay_time, decay_channel, decay_whole, stretch, own, column.real);
uint turn = 0;
for (uint tile = 0; tile < stretch.count; tile += SIMDS * STEPS) {
  Step total[WIDTH];
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    total[i] = step_of(1.0f, 0.0f);
    UNROLL
    for (int r = 0; r < STEPS; r++) {
      if (own + r < stretch.count) {
        const float by = decays[r].at(i);
        const float flow = flows[r].at(i);
        total[i].decay *= by;
        total[i].value = EXCLUSIVE ? by * total[i].value + flow : by * (total[i].value + flow);
      }
    }
  }
  // Of the two halves, one is read while the other is written.
  threadgroup float* const half_of_shared = shared + turn * (2 * SIMDS * 32 * WIDTH);
  tell<0, SIMDS, WIDTH>(total, half_of_shared, simdgroup, lane);
  const uint next = own + SIMDS * STEPS;
  Pack<T, WIDTH> next_flows[STEPS];
  Pack<T, WIDTH> next_states[STEPS];
  Pack<A, WIDTH> next_decays[STEPS];
  load_steps<T, WIDTH, STEPS>(next_flows, dy + offset, channels, 1, dy_whole, stretch, next, column.real);
  load_steps<T, WIDTH, STEPS>(next_states, y + offset, channels, 1, y_whole, earlier, next, column.real);
  load_steps<A, WIDTH, STEPS>(
      next_decays, decay + decay_offset, decay_time, decay_channel, decay_whole, stretch, next, column.real);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    hold_packed(flows[r]);
    hold_packed(decays[r]);
  }
  float c[WIDTH];
  hear<0, SIMDS, WIDTH>(c, carry, half_of_shared, simdgroup, lane);
  const long jump = long(stretch.by) * channels;
  size_t at = offset + long(stretch.first) * channels + long(own) * jump;
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    const bool real = column.real && own + r < stretch.count;
    const bool first = !EXCLUSIVE && own + r + 1 == stretch.count;
    T of_x[WIDTH];
    A of_decay[WIDTH];
    UNROLL
    for (int i = 0; i < WIDTH; i++) {
      const float by = decays[r].at(i);
      const float flow = flows[r].at(i);
      const float before = first ? state[began + i * state_strides[2]] : states[r].at(i);
      const float reached = EXCLUSIVE ? c[i] : flow + c[i];
      of_x[i] = T(reached);
      of_decay[i] = A(reached * before);
      c[i] = EXCLUSIVE ? by * c[i] + flow : by * reached;
    }
    if (real) {
      store_pack<T, WIDTH>(dx + at, of_x, dx_whole);
      store_pack<A, WIDTH>(ddecay + at, of_decay, ddecay_whole);
    }
    at += jump;
    flows[r] = next_flows[r];
    states[r] = next_states[r];
    decays[r] = next_decays[r];
  }
  own = next;
  turn ^= 1;
}
if (column.real && simdgroup == 0) {
  UNROLL
  for (int i = 0; i < WIDTH; i++) dstate[state_offset + i] = carry[i];
}

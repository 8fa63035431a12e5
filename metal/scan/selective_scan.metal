// The selective scan of sequences laid one after another, without a tensor of [T, D, N].
//
//   step    = delta + bias, or its softplus
//   h       = exp(step · a) · h + step · b · u                    [D, N] a step
//   y       = Σ_n c · h + d · u, · silu(z) where GATED            [T, D] of T
//   last    = h after the last step of a sequence                 [S, D, N] of float
//   saved   = h before every PERIOD-th step of each sequence      [P, D, N] of float, for the gradient
//
// u, delta: [T, D] of T; z: that, flat, or unread; a: [D, N] of float; b, c: [T, G, N] of T, channel d reading group
// d / (D / G); d (`skip`), bias: [D] of float or unread; state: [S, D, N] of float, flat, or unread; places: [S + 1, 2],
// the first step of each sequence and its first row of `saved`.
// A channel has LANES lanes of STATES states, which stay in registers, and a thread has WIDTH channels. STEPS steps at a
// time go through threadgroup memory; those after them are on their way from memory meanwhile.
// Grid: along x the blocks of THREADS / LANES · WIDTH channels of each group, along y the sequences. Threads: THREADS.
// Threadgroup memory: 4 · STEPS · (2 · channels + whole + 2 · LANES · STATES) bytes, where `whole` is the channels in whole
// fours.
// Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023 (arXiv:2312.00752).

// ---- body ----
constexpr int SPAN = THREADS / LANES;
constexpr int CHANNELS = SPAN * WIDTH;
constexpr int SIZE = LANES * STATES;
// Channels of an item of a tile: two where four would leave threads without one.
constexpr int FEW = STEPS * CHANNELS < 4 * THREADS ? 2 : 4;
constexpr int COLUMNS = CHANNELS / FEW;
constexpr int ITEMS = (STEPS * COLUMNS + THREADS - 1) / THREADS;
// Fours of the rows of b and c.
constexpr int QUADS = (STEPS * SIZE / 2 + THREADS - 1) / THREADS;
typedef Few<float, FEW> Channels;
THREADGROUP_ARRAY(float4, moves, [STEPS][CHANNELS / 2]);
// Of b and of c.
THREADGROUP_ARRAY(float4, gates, [2][STEPS][SIZE / 4]);
THREADGROUP_ARRAY(float4, sums, [STEPS][(CHANNELS + 3) / 4]);

const uint channels = u_shape[1];
const uint groups = b_shape[1];
const uint states = a_shape[1];
const uint of_group = channels / groups;
const uint blocks = threadgroups_per_grid.x / groups;
const uint group = threadgroup_position_in_grid.x / blocks;
const uint first = threadgroup_position_in_grid.x % blocks * CHANNELS;
const uint present = metal::min(uint(CHANNELS), of_group - first);
const uint origin = group * of_group + first;
const uint sequence = threadgroup_position_in_grid.y;
const uint begin = uint(places[2 * sequence]);
const uint end = uint(places[2 * sequence + 2]);
size_t row_of_saved = size_t(places[2 * sequence + 1]);

// As one that computes.
const uint index = thread_index_in_threadgroup;
const uint lane = index % LANES;
const uint slot = index / LANES;
const uint first_state = lane * STATES;
// As one that carries: always the same channels.
const uint column = index % COLUMNS * FEW;
float added[FEW];
float skipped[FEW];
UNROLL
for (int v = 0; v < FEW; v++) {
  const bool there = column + v < present;
  added[v] = BIASED && there ? bias[origin + column + v] : 0.0f;
  skipped[v] = SKIPS && there ? skip[origin + column + v] : 0.0f;
}
// Whether all that is read and written is whole items.
const bool whole = is_of_few<T, FEW>(u + origin, channels) && is_of_few<T, FEW>(delta + origin, channels) &&
    is_of_few<T, FEW>(y + origin, present) && (!GATED || is_of_few<T, FEW>(z + origin, channels)) &&
    is_of_few<T, 4>(b, states) && is_of_few<T, 4>(c, states) && is_of_few<float, 4>(saved, states);

float rates[WIDTH][STATES];
float held[WIDTH][STATES];
UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const bool there = channel < present;
  load_states<false, STATES>(rates[k], a + size_t(origin + channel) * states, first_state, states, there);
  for (int n = 0; n < STATES; n++) rates[k][n] *= 1.44269504f;
  const size_t row = size_t(sequence) * channels + origin + channel;
  load_states<false, STATES>(held[k], state + (STARTED ? row * states : 0), first_state, states, STARTED && there);
}

Packed<T, FEW> next_u[ITEMS];
Packed<T, FEW> next_delta[ITEMS];
Packed<T, FEW> next_z[ITEMS];
Packed<T, 4> next_gates[QUADS];
if (whole) {
  ask_for_channels<true, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
      next_u, u + origin, index, begin, end, channels, present);
  ask_for_channels<true, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
      next_delta, delta + origin, index, begin, end, channels, present);
  if (GATED) {
    ask_for_channels<true, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
        next_z, z + origin, index, begin, end, channels, present);
  }
  ask_for_gates<true, QUADS, THREADS, STEPS, SIZE, T>(
      next_gates, b + group * states, c + group * states, index, begin, end, end, groups * states, states);
} else {
  ask_for_channels<false, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
      next_u, u + origin, index, begin, end, channels, present);
  ask_for_channels<false, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
      next_delta, delta + origin, index, begin, end, channels, present);
  if (GATED) {
    ask_for_channels<false, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
        next_z, z + origin, index, begin, end, channels, present);
  }
  ask_for_gates<false, QUADS, THREADS, STEPS, SIZE, T>(
      next_gates, b + group * states, c + group * states, index, begin, end, end, groups * states, states);
}

for (uint tile = begin; tile < end; tile += STEPS) {
  Packed<T, FEW> kept_u[ITEMS];
  Packed<T, FEW> kept_z[ITEMS];
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint below = row_of_item<THREADS, COLUMNS>(index, i);
    kept_u[i] = next_u[i];
    if (GATED) kept_z[i] = next_z[i];
    const Channels entering = floats_of(next_u[i]);
    const Channels raw = floats_of(next_delta[i]);
    float moved[2 * FEW];
    UNROLL
    for (int v = 0; v < FEW; v++) {
      const bool there = column + v < present && tile + below < end;
      // A step of zero is none.
      const float step = there ? step_of<SOFTPLUS>(raw.values[v] + added[v]) : 0.0f;
      moved[2 * v] = step;
      moved[2 * v + 1] = step * entering.values[v];
    }
    if (is_among<THREADS, STEPS * COLUMNS>(index, i)) {
      UNROLL
      for (int v = 0; v < FEW / 2; v++) {
        moves[below][column / 2 + v] = quad_of(moved[4 * v], moved[4 * v + 1], moved[4 * v + 2], moved[4 * v + 3]);
      }
    }
  }
  place_gates<QUADS, THREADS, STEPS, SIZE, 1, STATES>(&gates[0][0][0], next_gates, index);
  if (whole) {
    ask_for_channels<true, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
        next_u, u + origin, index, tile + STEPS, end, channels, present);
    ask_for_channels<true, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
        next_delta, delta + origin, index, tile + STEPS, end, channels, present);
    if (GATED) {
      ask_for_channels<true, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
          next_z, z + origin, index, tile + STEPS, end, channels, present);
    }
    ask_for_gates<true, QUADS, THREADS, STEPS, SIZE, T>(
        next_gates, b + group * states, c + group * states, index, tile + STEPS, end, end, groups * states, states);
  } else {
    ask_for_channels<false, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
        next_u, u + origin, index, tile + STEPS, end, channels, present);
    ask_for_channels<false, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
        next_delta, delta + origin, index, tile + STEPS, end, channels, present);
    if (GATED) {
      ask_for_channels<false, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
          next_z, z + origin, index, tile + STEPS, end, channels, present);
    }
    ask_for_gates<false, QUADS, THREADS, STEPS, SIZE, T>(
        next_gates, b + group * states, c + group * states, index, tile + STEPS, end, end, groups * states, states);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if ((tile - begin) % PERIOD == 0) {
    UNROLL
    for (int k = 0; k < WIDTH; k++) {
      const uint channel = slot + k * SPAN;
      const size_t row = row_of_saved * channels + origin + channel;
      if (whole) {
        store_states<true, STATES>(saved + row * states, held[k], first_state, states, channel < present);
      } else {
        store_states<false, STATES>(saved + row * states, held[k], first_state, states, channel < present);
      }
    }
    row_of_saved++;
  }

  UNROLL
  for (int s = 0; s < STEPS; s += 4) {
    float partial[WIDTH][4];
    UNROLL
    for (int r = 0; r < 4; r++) {
      float in[STATES];
      float out[STATES];
      read_states<STATES>(in, gates[0][s + r], lane);
      read_states<STATES>(out, gates[1][s + r], lane);
      UNROLL
      for (int k = 0; k < WIDTH; k++) {
        const float2 move = ((threadgroup const float2*)moves[s + r])[slot + k * SPAN];
        partial[k][r] = 0.0f;
        UNROLL
        for (int n = 0; n < STATES; n++) {
          held[k][n] = metal::fast::exp2(move.x * rates[k][n]) * held[k][n] + move.y * in[n];
          partial[k][r] += out[n] * held[k][n];
        }
      }
    }
    UNROLL
    for (int k = 0; k < WIDTH; k++) {
      const float sum = sum_of_four<LANES>(partial[k], lane);
      if (lane < 4) ((threadgroup float*)sums[s + summed_of(lane)])[slot + k * SPAN] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint below = row_of_item<THREADS, COLUMNS>(index, i);
    if (is_among<THREADS, STEPS * COLUMNS>(index, i) && tile + below < end) {
      const Channels sum = few_at<FEW>(sums[below], column / FEW);
      const Channels entered = floats_of(kept_u[i]);
      Channels gate;
      if (GATED) gate = floats_of(kept_z[i]);
      Few<T, FEW> result;
      UNROLL
      for (int v = 0; v < FEW; v++) {
        float value = sum.values[v] + skipped[v] * entered.values[v];
        if (GATED) value *= gate.values[v] * sigmoid_of(gate.values[v]).value;
        result.values[v] = T(value);
      }
      device T* row = y + size_t(tile + below) * channels + origin;
      if (whole) {
        write_few<true, T, FEW>(row, column, present, result);
      } else {
        write_few<false, T, FEW>(row, column, present, result);
      }
    }
  }
}

UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const size_t row = size_t(sequence) * channels + origin + channel;
  store_states<false, STATES>(last + row * states, held[k], first_state, states, channel < present);
}

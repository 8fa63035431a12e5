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
// Threadgroup memory: 12 · STEPS · channels + 8 · STEPS · LANES · STATES bytes.
// Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023 (arXiv:2312.00752).

// ---- body ----
constexpr int SPAN = THREADS / LANES;
constexpr int CHANNELS = SPAN * WIDTH;
constexpr int SIZE = LANES * STATES;
constexpr int ITEMS = (STEPS * CHANNELS + THREADS - 1) / THREADS;
constexpr int STATE_ITEMS = (STEPS * SIZE + THREADS - 1) / THREADS;
THREADGROUP_ARRAY(float2, moves, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float4, entries, [STEPS][SIZE / 4]);
THREADGROUP_ARRAY(float4, exits, [STEPS][SIZE / 4]);
THREADGROUP_ARRAY(float, sums, [STEPS][CHANNELS]);

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
// As one that carries: always the same channel.
const uint column = index % CHANNELS;
const bool carries = column < present;
const float added = BIASED && carries ? bias[origin + column] : 0.0f;
const float skipped = SKIPS && carries ? skip[origin + column] : 0.0f;

float rates[WIDTH][STATES];
float held[WIDTH][STATES];
UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const bool there = channel < present;
  load_states<STATES>(rates[k], a + size_t(origin + channel) * states, first_state, states, there);
  for (int n = 0; n < STATES; n++) rates[k][n] *= 1.44269504f;
  const size_t row = size_t(sequence) * channels + origin + channel;
  load_states<STATES>(held[k], state + (STARTED ? row * states : 0), first_state, states, STARTED && there);
}

T next_u[ITEMS];
T next_delta[ITEMS];
T next_z[ITEMS];
T next_b[STATE_ITEMS];
T next_c[STATE_ITEMS];
read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(next_u, u + origin, index, begin, end, channels, present);
read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(next_delta, delta + origin, index, begin, end, channels, present);
if (GATED) {
  read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(next_z, z + origin, index, begin, end, channels, present);
}
read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(
    next_b, b + group * states, index, begin, end, groups * states, states);
read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(
    next_c, c + group * states, index, begin, end, groups * states, states);

for (uint tile = begin; tile < end; tile += STEPS) {
  T kept_u[ITEMS];
  T kept_z[ITEMS];
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint at = index + i * THREADS;
    kept_u[i] = next_u[i];
    if (GATED) kept_z[i] = next_z[i];
    if (at < STEPS * CHANNELS) {
      const bool there = carries && tile + at / CHANNELS < end;
      // A step of zero is none.
      const float step = there ? step_of<SOFTPLUS>(float(next_delta[i]) + added) : 0.0f;
      moves[at / CHANNELS][column].x = step;
      moves[at / CHANNELS][column].y = step * float(next_u[i]);
    }
  }
  place_share<STATE_ITEMS, THREADS, STEPS * SIZE>((threadgroup float*)&entries[0][0], next_b, index);
  place_share<STATE_ITEMS, THREADS, STEPS * SIZE>((threadgroup float*)&exits[0][0], next_c, index);
  const uint next = tile + STEPS;
  read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(next_u, u + origin, index, next, end, channels, present);
  read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(next_delta, delta + origin, index, next, end, channels, present);
  if (GATED) {
    read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(next_z, z + origin, index, next, end, channels, present);
  }
  read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(
      next_b, b + group * states, index, next, end, groups * states, states);
  read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(
      next_c, c + group * states, index, next, end, groups * states, states);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if ((tile - begin) % PERIOD == 0) {
    UNROLL
    for (int k = 0; k < WIDTH; k++) {
      const uint channel = slot + k * SPAN;
      const size_t row = row_of_saved * channels + origin + channel;
      store_states<STATES>(saved + row * states, held[k], first_state, states, channel < present);
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
      read_states<STATES>(in, entries[s + r], lane);
      read_states<STATES>(out, exits[s + r], lane);
      UNROLL
      for (int k = 0; k < WIDTH; k++) {
        const float2 move = moves[s + r][slot + k * SPAN];
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
      if (lane < 4) sums[s + summed_of(lane)][slot + k * SPAN] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint below = (index + i * THREADS) / CHANNELS;
    if (below < STEPS && tile + below < end && carries) {
      float value = sums[below][column] + skipped * float(kept_u[i]);
      if (GATED) {
        const float gate = float(kept_z[i]);
        value *= gate * sigmoid_of(gate).value;
      }
      y[size_t(tile + below) * channels + origin + column] = T(value);
    }
  }
}

UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const size_t row = size_t(sequence) * channels + origin + channel;
  store_states<STATES>(last + row * states, held[k], first_state, states, channel < present);
}

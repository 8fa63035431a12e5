// The gradient of the selective scan.
//
//   dy0    = dy, or dy · silu(z) where GATED
//   g      = c · dy0 + exp(next step · a) · next g                        [D, N] a step, dlast after the last one
//   p      = exp(step · a) · h before the step
//   du     = step · Σ_n g · b + d · dy0                                   [T, D] of T
//   dstep  = u · Σ_n g · b + Σ_n a · g · p;  ddelta = dstep, · σ(delta + bias) where SOFTPLUS
//   dz     = dy · (Σ_n c · h + d · u) · silu'(z)                          that, flat, or one zero
//   da     = Σ_t step · g · p, of each sequence                           [S, D, N] of float
//   db, dc = Σ_d step · u · g, Σ_d dy0 · h, of each block of channels     [R, T, G, N] of float
//   dskip, dbias = Σ_t dy0 · u, Σ_t ddelta, of each sequence              [S, D] of float
//   dstate = g before the first step                                      [S, D, N] of float
//
// u, delta, z, a, b, c, skip, bias and places as the scan has them; `saved`: [P, D, N] of float, its states before every
// PERIOD-th step; dy: [T, D] of T; dlast: [S, D, N] of float. From the last step to the first, STEPS at a time: the states
// of those are computed from the last that was saved, and stay in registers with their decays until the gradient has come
// past.
// Grid: along x the blocks of THREADS / LANES · WIDTH channels of each group, along y the sequences. Threads: THREADS.
// Threadgroup memory: STEPS · (24 · channels + 8 · LANES · STATES · (1 + THREADS / 32)) + 8 · THREADS bytes.

// ---- body ----
constexpr int SPAN = THREADS / LANES;
constexpr int CHANNELS = SPAN * WIDTH;
constexpr int SIZE = LANES * STATES;
constexpr int ITEMS = (STEPS * CHANNELS + THREADS - 1) / THREADS;
constexpr int STATE_ITEMS = (STEPS * SIZE + THREADS - 1) / THREADS;
// What a lane has left of its 2 · STATES sums over the channels of its simdgroup.
constexpr int LEFT = 2 * STATES * LANES / 32;
THREADGROUP_ARRAY(float2, moves, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float, slopes, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float4, entries, [STEPS][SIZE / 4]);
THREADGROUP_ARRAY(float4, exits, [STEPS][SIZE / 4]);
THREADGROUP_ARRAY(float, sums_of_b, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float, sums_of_a, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float, sums_of_c, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float, partial, [THREADS / 32][STEPS][2 * SIZE]);
THREADGROUP_ARRAY(float, totals, [2][THREADS]);

const uint steps = u_shape[0];
const uint channels = u_shape[1];
const uint groups = b_shape[1];
const uint states = a_shape[1];
const uint of_group = channels / groups;
const uint blocks = threadgroups_per_grid.x / groups;
const uint group = threadgroup_position_in_grid.x / blocks;
const uint block = threadgroup_position_in_grid.x % blocks;
const uint first = block * CHANNELS;
const uint present = metal::min(uint(CHANNELS), of_group - first);
const uint origin = group * of_group + first;
const uint sequence = threadgroup_position_in_grid.y;
const uint begin = uint(places[2 * sequence]);
const uint end = uint(places[2 * sequence + 2]);
const uint first_saved = uint(places[2 * sequence + 1]);

// As one that computes.
const uint index = thread_index_in_threadgroup;
const uint lane = index % LANES;
const uint slot = index / LANES;
const uint lane_of_simd = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
// As one that carries: always the same channel.
const uint column = index % CHANNELS;
const bool carries = column < present;
const float added = BIASED && carries ? bias[origin + column] : 0.0f;
const float skipped = SKIPS && carries ? skip[origin + column] : 0.0f;
float dskip_of_column = 0.0f;
float dbias_of_column = 0.0f;

float rates[WIDTH][STATES];
float coming[WIDTH][STATES];
float da_held[WIDTH][STATES];
UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const bool there = channel < present;
  load_states<STATES>(rates[k], a + size_t(origin + channel) * states, lane, states, there);
  const size_t row = size_t(sequence) * channels + origin + channel;
  load_states<STATES>(coming[k], dlast + row * states, lane, states, there);
  for (int n = 0; n < STATES; n++) {
    rates[k][n] *= 1.44269504f;
    da_held[k][n] = 0.0f;
  }
}

const uint periods = (end - begin + PERIOD - 1) / PERIOD;
for (uint period = periods; period-- > 0;) {
  const uint start = begin + period * PERIOD;
  for (int turn = PERIOD / STEPS; turn-- > 0;) {
    const uint tile = start + turn * STEPS;
    if (tile >= end) continue;
    float held[WIDTH][STATES];
    UNROLL
    for (int k = 0; k < WIDTH; k++) {
      const uint channel = slot + k * SPAN;
      const size_t row = size_t(first_saved + period) * channels + origin + channel;
      load_states<STATES>(held[k], saved + row * states, lane, states, channel < present);
    }

    // The tiles before this one for the state alone, then this one.
    for (int past = 0; past <= turn; past++) {
      const uint from = start + past * STEPS;
      {
        T share_u[ITEMS];
        T share_delta[ITEMS];
        T share_b[STATE_ITEMS];
        read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(
            share_u, u + origin, index, from, end, channels, present);
        read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(
            share_delta, delta + origin, index, from, end, channels, present);
        read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(
            share_b, b + group * states, index, from, end, groups * states, states);
        UNROLL
        for (int i = 0; i < ITEMS; i++) {
          const uint at = index + i * THREADS;
          if (at < STEPS * CHANNELS) {
            const bool there = carries && from + at / CHANNELS < end;
            const float step = there ? step_of<SOFTPLUS>(float(share_delta[i]) + added) : 0.0f;
            moves[at / CHANNELS][column].x = step;
            moves[at / CHANNELS][column].y = step * float(share_u[i]);
          }
        }
        place_share<STATE_ITEMS, THREADS, STEPS * SIZE>((threadgroup float*)&entries[0][0], share_b, index);
      }
      if (past == turn) break;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      UNROLL
      for (int s = 0; s < STEPS; s++) {
        float in[STATES];
        read_states<STATES>(in, entries[s], lane);
        UNROLL
        for (int k = 0; k < WIDTH; k++) {
          const float2 move = moves[s][slot + k * SPAN];
          for (int n = 0; n < STATES; n++) {
            held[k][n] = metal::fast::exp2(move.x * rates[k][n]) * held[k][n] + move.y * in[n];
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    {
      T share_dy[ITEMS];
      T share_z[ITEMS];
      T share_c[STATE_ITEMS];
      read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(share_dy, dy + origin, index, tile, end, channels, present);
      if (GATED) {
        read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(share_z, z + origin, index, tile, end, channels, present);
      }
      read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(
          share_c, c + group * states, index, tile, end, groups * states, states);
      UNROLL
      for (int i = 0; i < ITEMS; i++) {
        const uint at = index + i * THREADS;
        if (at < STEPS * CHANNELS) {
          float slope = float(share_dy[i]);
          if (GATED) {
            const float gate = float(share_z[i]);
            slope *= gate * sigmoid_of(gate).value;
          }
          slopes[at / CHANNELS][column] = slope;
        }
      }
      place_share<STATE_ITEMS, THREADS, STEPS * SIZE>((threadgroup float*)&exits[0][0], share_c, index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    float reached[STEPS + 1][WIDTH][STATES];
    float decays[STEPS][WIDTH][STATES];
    UNROLL
    for (int k = 0; k < WIDTH; k++) {
      for (int n = 0; n < STATES; n++) reached[0][k][n] = held[k][n];
    }
    UNROLL
    for (int s = 0; s < STEPS; s++) {
      float in[STATES];
      read_states<STATES>(in, entries[s], lane);
      UNROLL
      for (int k = 0; k < WIDTH; k++) {
        const float2 move = moves[s][slot + k * SPAN];
        for (int n = 0; n < STATES; n++) {
          decays[s][k][n] = metal::fast::exp2(move.x * rates[k][n]);
          reached[s + 1][k][n] = decays[s][k][n] * reached[s][k][n] + move.y * in[n];
        }
      }
    }

    UNROLL
    for (int s = STEPS - 4; s >= 0; s -= 4) {
      float of_b[WIDTH][4];
      float of_a[WIDTH][4];
      float of_c[WIDTH][4];
      UNROLL
      for (int r = 3; r >= 0; r--) {
        float in[STATES];
        float out[STATES];
        float over_channels[2 * STATES];
        read_states<STATES>(in, entries[s + r], lane);
        read_states<STATES>(out, exits[s + r], lane);
        for (int v = 0; v < 2 * STATES; v++) over_channels[v] = 0.0f;
        UNROLL
        for (int k = 0; k < WIDTH; k++) {
          const float2 move = moves[s + r][slot + k * SPAN];
          const float slope = slopes[s + r][slot + k * SPAN];
          of_b[k][r] = 0.0f;
          of_a[k][r] = 0.0f;
          of_c[k][r] = 0.0f;
          UNROLL
          for (int n = 0; n < STATES; n++) {
            const float g = coming[k][n] + out[n] * slope;
            const float passed = g * (decays[s + r][k][n] * reached[s + r][k][n]);
            coming[k][n] = decays[s + r][k][n] * g;
            da_held[k][n] += move.x * passed;
            of_a[k][r] += rates[k][n] * passed;
            of_b[k][r] += g * in[n];
            of_c[k][r] += out[n] * reached[s + r + 1][k][n];
            over_channels[n] += move.y * g;
            over_channels[STATES + n] += slope * reached[s + r + 1][k][n];
          }
        }
        const uint left = sum_by_halves<2 * STATES, LANES>(over_channels, lane_of_simd);
        UNROLL
        for (int v = 0; v < LEFT; v++) {
          const uint which = left + v;
          const uint at = which < STATES ? lane * STATES + which : SIZE + lane * STATES + which - STATES;
          partial[simdgroup][s + r][at] = over_channels[v];
        }
      }
      UNROLL
      for (int k = 0; k < WIDTH; k++) {
        const float by_b = sum_of_four<LANES>(of_b[k], lane);
        const float by_a = sum_of_four<LANES>(of_a[k], lane);
        const float by_c = GATED ? sum_of_four<LANES>(of_c[k], lane) : 0.0f;
        if (lane < 4) {
          const uint row = s + summed_of(lane);
          sums_of_b[row][slot + k * SPAN] = by_b;
          sums_of_a[row][slot + k * SPAN] = by_a;
          if (GATED) sums_of_c[row][slot + k * SPAN] = by_c;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    UNROLL
    for (int i = 0; i < ITEMS; i++) {
      const uint below = (index + i * THREADS) / CHANNELS;
      if (below < STEPS && tile + below < end && carries) {
        const size_t at = size_t(tile + below) * channels + origin + column;
        const float entered = float(u[at]);
        const float raw = float(delta[at]) + added;
        const float step = moves[below][column].x;
        const float slope = slopes[below][column];
        float dstep = entered * sums_of_b[below][column] + 0.693147181f * sums_of_a[below][column];
        if (SOFTPLUS) dstep *= sigmoid_of(raw).value;
        du[at] = T(step * sums_of_b[below][column] + skipped * slope);
        ddelta[at] = T(dstep);
        if (GATED) {
          const float gate = float(z[at]);
          const Curve silu = gated_by_sigmoid(gate, gate, 1.0f);
          dz[at] = T(float(dy[at]) * (sums_of_c[below][column] + skipped * entered) * silu.slope);
        }
        dskip_of_column += slope * entered;
        dbias_of_column += dstep;
      }
    }
    for (uint at = index; at < STEPS * 2 * SIZE; at += THREADS) {
      const uint below = at / (2 * SIZE);
      const uint which = at % (2 * SIZE);
      const uint n = which % SIZE;
      if (tile + below < end && n < states) {
        float sum = 0.0f;
        for (int i = 0; i < THREADS / 32; i++) sum += partial[i][below][which];
        const size_t to = ((size_t(block) * steps + tile + below) * groups + group) * states + n;
        if (which < SIZE) {
          db[to] = sum;
        } else {
          dc[to] = sum;
        }
      }
    }
    // What is read here is written again only after another barrier, but for the moves and the slopes.
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const size_t row = (size_t(sequence) * channels + origin + channel) * states;
  store_states<STATES>(da + row, da_held[k], lane, states, channel < present);
  store_states<STATES>(dstate + row, coming[k], lane, states, channel < present);
}
totals[0][index] = dskip_of_column;
totals[1][index] = dbias_of_column;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (index < present) {
  float dskip_sum = 0.0f;
  float dbias_sum = 0.0f;
  for (int i = 0; i < THREADS / CHANNELS; i++) {
    dskip_sum += totals[0][index + i * CHANNELS];
    dbias_sum += totals[1][index + i * CHANNELS];
  }
  const size_t at = size_t(sequence) * channels + origin + index;
  dskip[at] = dskip_sum;
  dbias[at] = dbias_sum;
}
if (!GATED && threadgroup_position_in_grid.x == 0 && sequence == 0 && index == 0) dz[0] = T(0.0f);

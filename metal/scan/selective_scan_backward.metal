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
// past. Where a period is several such tiles, all but the last are first gone through for the state alone, and what each
// begins with is kept. What is read of a tile is asked for while the one before it is worked on.
// Of b and c there are COPIES, a power of two that is at most STATES and 32 / LANES, each for as many channels of a
// simdgroup: in each a lane's states lie in another order, which `sum_by_halves` asks for, and so they do in registers.
// Grid: along x the blocks of THREADS / LANES · WIDTH channels of each group, along y the sequences. Threads: THREADS.
// Threadgroup memory: STEPS · (24 · channels + 384 / LANES + 8 · LANES · STATES · (COPIES + THREADS / 32)) bytes, and
// 4 · THREADS for each of the (PERIOD / STEPS - 1) · WIDTH · STATES states kept, or for two.

// A thread's share of what is read of a tile, and the states before it if they were saved.
template <int OF_CHANNELS, int OF_STATES, int WIDTH, int STATES, typename T>
struct Asked {
  enum : int { ITEMS = OF_CHANNELS, STATE_ITEMS = OF_STATES };
  T u[ITEMS];
  T delta[ITEMS];
  T b[STATE_ITEMS];
  T dy[ITEMS];
  T z[ITEMS];
  T c[STATE_ITEMS];
  float held[WIDTH][STATES];
};

// Asks for the tile from `row` on, of what only the way back reads for the steps before `end_of_back`.
template <
    int THREADS, int STEPS, int CHANNELS, int SIZE, bool GATED, typename T, typename A, typename U, typename Z,
    typename B>
METAL_FUNC void ask_for_tile(
    thread A& asked, U u, U delta, U dy, Z z, B b, B c, uint index, uint row, uint end, uint end_of_back,
    uint channels, uint present, uint stride, uint states) {
  constexpr int ITEMS = A::ITEMS;
  constexpr int STATE_ITEMS = A::STATE_ITEMS;
  read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(asked.u, u, index, row, end, channels, present);
  read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(asked.delta, delta, index, row, end, channels, present);
  read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(asked.b, b, index, row, end, stride, states);
  read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(asked.dy, dy, index, row, end_of_back, channels, present);
  if (GATED) {
    read_share<ITEMS, THREADS, STEPS, CHANNELS, T>(asked.z, z, index, row, end_of_back, channels, present);
  }
  read_share<STATE_ITEMS, THREADS, STEPS, SIZE, T>(asked.c, c, index, row, end_of_back, stride, states);
}

// Asks for the states of a thread's channels, which begin at `row` with those of its group's first.
template <int SPAN, int WIDTH, int STATES, typename Pointer>
METAL_FUNC void ask_for_states(
    thread float (&held)[WIDTH][STATES], Pointer row, uint slot, uint first_state, uint states, uint present) {
  UNROLL
  for (int k = 0; k < WIDTH; k++) {
    const uint channel = slot + k * SPAN;
    load_states<STATES>(held[k], row + channel * states, first_state, states, channel < present);
  }
}

// Puts a thread's share of rows of SIZE states into threadgroup memory, in f32, the n-th state of a row's i-th copy at
// n ^ (i · TURN).
template <int ITEMS, int THREADS, int STEPS, int SIZE, int COPIES, int TURN, typename T>
METAL_FUNC void place_copies(threadgroup float* to, thread const T* items, uint index) {
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint row = row_of_item<THREADS, SIZE>(index, i);
    const uint n = column_of_item<THREADS, SIZE>(index, i);
    UNROLL
    for (int copy = 0; copy < COPIES; copy++) {
      if (is_among<THREADS, STEPS * SIZE>(index, i)) {
        to[(row * COPIES + copy) * SIZE + (n ^ (copy * TURN))] = float(items[i]);
      }
    }
  }
}

// ---- body ----
constexpr int SPAN = THREADS / LANES;
constexpr int CHANNELS = SPAN * WIDTH;
constexpr int SIZE = LANES * STATES;
constexpr int TILES = PERIOD / STEPS;
constexpr int KEPT = (TILES - 1) * WIDTH * STATES;
constexpr int TURN = STATES / COPIES;
// Four rows of the sums of a simdgroup's channels lie in different banks.
constexpr int PITCH = CHANNELS + 32 / LANES;
// The steps after which the next ones are asked for: those that are behind take no more registers.
constexpr int ASKED_AT = STEPS / 8 * 4;
constexpr int ITEMS = (STEPS * CHANNELS + THREADS - 1) / THREADS;
constexpr int QUADS = (STEPS * SIZE / 2 + THREADS - 1) / THREADS;
constexpr int STATE_ITEMS = (STEPS * SIZE + THREADS - 1) / THREADS;
// What a lane has left of its 2 · STATES sums over the channels of its simdgroup.
constexpr int LEFT = 2 * STATES * LANES / 32;
THREADGROUP_ARRAY(float2, moves, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float, slopes, [STEPS][CHANNELS]);
THREADGROUP_ARRAY(float4, entries, [STEPS][COPIES][SIZE / 4]);
THREADGROUP_ARRAY(float4, exits, [STEPS][COPIES][SIZE / 4]);
THREADGROUP_ARRAY(float, sums_of_b, [STEPS][PITCH]);
THREADGROUP_ARRAY(float, sums_of_a, [STEPS][PITCH]);
THREADGROUP_ARRAY(float, sums_of_c, [STEPS][PITCH]);
THREADGROUP_ARRAY(float, kept, [KEPT > 2 ? KEPT : 2][THREADS]);
THREADGROUP_ARRAY(float4, partial, [THREADS / 32][STEPS][SIZE / 2]);

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
const uint copy = lane_of_simd / (32 / COPIES);
const uint first_state = lane * STATES + copy * TURN;
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
  load_states<STATES>(rates[k], a + size_t(origin + channel) * states, first_state, states, there);
  const size_t row = size_t(sequence) * channels + origin + channel;
  load_states<STATES>(coming[k], dlast + row * states, first_state, states, there);
  for (int n = 0; n < STATES; n++) {
    rates[k][n] *= 1.44269504f;
    da_held[k][n] = 0.0f;
  }
}

const uint periods = (end - begin + PERIOD - 1) / PERIOD;
Asked<ITEMS, STATE_ITEMS, WIDTH, STATES, T> asked;
{
  const uint last = periods > 0 ? periods - 1 : 0;
  ask_for_tile<THREADS, STEPS, CHANNELS, SIZE, GATED, T>(
      asked, u + origin, delta + origin, dy + origin, z + (GATED ? origin : 0),
      b + group * states, c + group * states, index, begin + last * PERIOD,
      end, end, channels, present, groups * states, states);
  ask_for_states<SPAN, WIDTH, STATES>(
      asked.held, saved + (size_t(first_saved + last) * channels + origin) * states,
      slot, first_state, states, periods > 0 ? present : 0);
}
float held[WIDTH][STATES];
for (uint period = periods; period-- > 0;) {
  const uint start = begin + period * PERIOD;
  const int tiles = TILES == 1 ? 1 : metal::min(TILES, int(end - start + STEPS - 1) / STEPS);
  // Over all tiles but the last for the state alone, then back over all.
  for (int visit = 1 - tiles; visit < tiles; visit++) {
    const bool back = TILES == 1 || visit >= 0;
    const int turn = tiles - 1 - (visit < 0 ? -visit : visit);
    const uint tile = start + turn * STEPS;
    float entered[ITEMS];
    float of_step[ITEMS];
    float of_gate[ITEMS];
    UNROLL
    for (int i = 0; i < ITEMS; i++) {
      const uint below = row_of_item<THREADS, CHANNELS>(index, i);
      entered[i] = float(asked.u[i]);
      const float raw = float(asked.delta[i]) + added;
      const Curve curve = SOFTPLUS ? softplus_of(raw) : curve_of(raw, 1.0f);
      of_step[i] = curve.slope;
      const float arriving = float(asked.dy[i]);
      const float gate = GATED ? float(asked.z[i]) : 0.0f;
      const Curve silu = GATED ? gated_by_sigmoid(gate, gate, 1.0f) : curve_of(1.0f, 0.0f);
      of_gate[i] = arriving * silu.slope;
      if (is_among<THREADS, STEPS * CHANNELS>(index, i)) {
        // A step of zero is none.
        const float step = carries && tile + below < end ? curve.value : 0.0f;
        moves[below][column].x = step;
        moves[below][column].y = step * entered[i];
        slopes[below][column] = arriving * silu.value;
      }
    }
    place_copies<STATE_ITEMS, THREADS, STEPS, SIZE, COPIES, TURN>(
        (threadgroup float*)&entries[0][0][0], asked.b, index);
    place_copies<STATE_ITEMS, THREADS, STEPS, SIZE, COPIES, TURN>((threadgroup float*)&exits[0][0][0], asked.c, index);
    UNROLL
    for (int k = 0; k < WIDTH; k++) {
      for (int n = 0; n < STATES; n++) {
        const int at = k * STATES + n;
        if (visit == 1 - tiles) held[k][n] = asked.held[k][n];
        if (TILES > 1 && visit < 0) kept[turn * WIDTH * STATES + at][index] = held[k][n];
        if (TILES > 1 && visit > 0) held[k][n] = kept[turn * WIDTH * STATES + at][index];
      }
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
      read_states<STATES>(in, entries[s][copy], lane);
      UNROLL
      for (int k = 0; k < WIDTH; k++) {
        const float2 move = moves[s][slot + k * SPAN];
        for (int n = 0; n < STATES; n++) {
          decays[s][k][n] = metal::fast::exp2(move.x * rates[k][n]);
          reached[s + 1][k][n] = decays[s][k][n] * reached[s][k][n] + move.y * in[n];
        }
      }
    }
    if (TILES > 1) {
      UNROLL
      for (int k = 0; k < WIDTH; k++) {
        for (int n = 0; n < STATES; n++) held[k][n] = reached[STEPS][k][n];
      }
    }

    UNROLL
    for (int s = STEPS - 4; s >= 0; s -= 4) {
      if (back) {
        float of_b[WIDTH][4];
        float of_a[WIDTH][4];
        float of_c[WIDTH][4];
        UNROLL
        for (int r = 3; r >= 0; r--) {
          float in[STATES];
          float out[STATES];
          float over_channels[2 * STATES];
          read_states<STATES>(in, entries[s + r][copy], lane);
          read_states<STATES>(out, exits[s + r][copy], lane);
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
              coming[k][n] = decays[s + r][k][n] * g;
              const float passed = coming[k][n] * reached[s + r][k][n];
              da_held[k][n] += move.x * passed;
              of_a[k][r] += rates[k][n] * passed;
              of_b[k][r] += g * in[n];
              of_c[k][r] += out[n] * reached[s + r + 1][k][n];
              over_channels[2 * n] += move.y * g;
              over_channels[2 * n + 1] += slope * reached[s + r + 1][k][n];
            }
          }
          const uint left = sum_by_halves<2 * STATES, LANES, COPIES>(over_channels, lane_of_simd);
          UNROLL
          for (int v = 0; v < LEFT; v++) {
            const uint which = left + v;
            const uint at = which % 2 * SIZE + (first_state ^ (which / 2));
            ((threadgroup float*)&partial[simdgroup][s + r][0])[at] = over_channels[v];
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
      if (s == ASKED_AT) {
        // Nothing is asked for after the last.
        const bool within = TILES > 1 && visit + 1 < tiles;
        const uint next = within ? start + (tiles - 1 - (visit < -1 ? -visit - 1 : visit + 1)) * STEPS
                                 : (period > 0 ? start - PERIOD : end);
        const uint end_of_back = TILES == 1 || (within && visit >= -1) ? end : 0;
        ask_for_tile<THREADS, STEPS, CHANNELS, SIZE, GATED, T>(
            asked, u + origin, delta + origin, dy + origin, z + (GATED ? origin : 0),
            b + group * states, c + group * states, index, next,
            end, end_of_back, channels, present, groups * states, states);
        ask_for_states<SPAN, WIDTH, STATES>(
            asked.held, saved + (size_t(first_saved + (period > 0 ? period - 1 : 0)) * channels + origin) * states,
            slot, first_state, states, within || period == 0 ? 0 : present);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!back) continue;

    UNROLL
    for (int i = 0; i < ITEMS; i++) {
      const uint below = row_of_item<THREADS, CHANNELS>(index, i);
      if (is_among<THREADS, STEPS * CHANNELS>(index, i) && tile + below < end && carries) {
        const uint at = (tile + below) * channels + origin + column;
        const float step = moves[below][column].x;
        const float slope = slopes[below][column];
        const float by_b = sums_of_b[below][column];
        const float dstep = of_step[i] * (entered[i] * by_b + 0.693147181f * sums_of_a[below][column]);
        du[at] = T(step * by_b + skipped * slope);
        ddelta[at] = T(dstep);
        if (GATED) dz[at] = T(of_gate[i] * (sums_of_c[below][column] + skipped * entered[i]));
        dskip_of_column += slope * entered[i];
        dbias_of_column += dstep;
      }
    }
    UNROLL
    for (int i = 0; i < QUADS; i++) {
      const uint below = row_of_item<THREADS, SIZE / 2>(index, i);
      const uint quad = column_of_item<THREADS, SIZE / 2>(index, i);
      if (is_among<THREADS, STEPS * SIZE / 2>(index, i) && tile + below < end) {
        Chunk<float> sum;
        for (int v = 0; v < 4; v++) sum.values[v] = 0.0f;
        UNROLL
        for (int by = 0; by < THREADS / 32; by++) {
          const float4 part = partial[by][below][quad];
          sum.values[0] += part.x;
          sum.values[1] += part.y;
          sum.values[2] += part.z;
          sum.values[3] += part.w;
        }
        const uint row = ((block * steps + tile + below) * groups + group) * states;
        write_chunk<float>((quad < SIZE / 4 ? db : dc) + row, 4 * (quad % (SIZE / 4)), states, sum);
      }
    }
  }
}

UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const size_t row = (size_t(sequence) * channels + origin + channel) * states;
  store_states<STATES>(da + row, da_held[k], first_state, states, channel < present);
  store_states<STATES>(dstate + row, coming[k], first_state, states, channel < present);
}
kept[0][index] = dskip_of_column;
kept[1][index] = dbias_of_column;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (index < present) {
  float dskip_sum = 0.0f;
  float dbias_sum = 0.0f;
  for (int i = 0; i < THREADS / CHANNELS; i++) {
    dskip_sum += kept[0][index + i * CHANNELS];
    dbias_sum += kept[1][index + i * CHANNELS];
  }
  const size_t at = size_t(sequence) * channels + origin + index;
  dskip[at] = dskip_sum;
  dbias[at] = dbias_sum;
}
if (!GATED && threadgroup_position_in_grid.x == 0 && sequence == 0 && index == 0) dz[0] = T(0.0f);

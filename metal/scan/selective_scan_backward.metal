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
// Threadgroup memory: 4 · STEPS · (2 · channels + whole + 3 · pitch + 2 · LANES · STATES · (COPIES + THREADS / 32)) bytes,
// where `whole` and the pitch are the channels and 32 / LANES more in whole fours, and 4 · THREADS for each of the
// (PERIOD / STEPS - 1) · WIDTH · STATES states kept, or for two. A group has 32 channels at most.

// A thread's share of what is read of a tile, and the states before it if they were saved.
template <int OF_CHANNELS, int OF_STATES, int OF_FEW, int WIDTH, int STATES, typename T>
struct Asked {
  enum : int { ITEMS = OF_CHANNELS, STATE_ITEMS = OF_STATES, FEW = OF_FEW };
  Packed<T, FEW> u[ITEMS];
  Packed<T, FEW> delta[ITEMS];
  Packed<T, FEW> dy[ITEMS];
  Packed<T, FEW> z[ITEMS];
  Packed<T, 4> gates[STATE_ITEMS];
  float held[WIDTH][STATES];
};

// Asks for the tile from `row` on, of what only the way back reads for the steps before `end_of_back`.
template <
    bool WHOLE, int THREADS, int STEPS, int CHANNELS, int SIZE, bool GATED, typename T, typename A, typename U,
    typename Z, typename B>
METAL_FUNC void ask_for_tile(
    thread A& asked, U u, U delta, U dy, Z z, B b, B c, uint index, uint row, uint end, uint end_of_back,
    uint channels, uint present, uint stride, uint states) {
  constexpr int ITEMS = A::ITEMS;
  constexpr int FEW = A::FEW;
  constexpr int COLUMNS = CHANNELS / FEW;
  ask_for_channels<WHOLE, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
      asked.u, u, index, row, end, channels, present);
  ask_for_channels<WHOLE, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
      asked.delta, delta, index, row, end, channels, present);
  ask_for_channels<WHOLE, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
      asked.dy, dy, index, row, end_of_back, channels, present);
  if (GATED) {
    ask_for_channels<WHOLE, ITEMS, THREADS, STEPS, COLUMNS, FEW, T>(
        asked.z, z, index, row, end_of_back, channels, present);
  }
  ask_for_gates<WHOLE, A::STATE_ITEMS, THREADS, STEPS, SIZE, T>(
      asked.gates, b, c, index, row, end, end_of_back, stride, states);
}

// Asks for the states of a thread's channels, which begin at `row` with those of its group's first.
template <bool WHOLE, int SPAN, int WIDTH, int STATES, typename Pointer>
METAL_FUNC void ask_for_states(
    thread float (&held)[WIDTH][STATES], Pointer row, uint slot, uint first_state, uint states, uint present) {
  UNROLL
  for (int k = 0; k < WIDTH; k++) {
    const uint channel = slot + k * SPAN;
    load_states<WHOLE, STATES>(held[k], row + channel * states, first_state, states, channel < present);
  }
}

// ---- body ----
constexpr int SPAN = THREADS / LANES;
constexpr int CHANNELS = SPAN * WIDTH;
constexpr int SIZE = LANES * STATES;
constexpr int TILES = PERIOD / STEPS;
constexpr int KEPT = (TILES - 1) * WIDTH * STATES;
constexpr int TURN = STATES / COPIES;
// Sums are written once for so many steps: what a step reads from threadgroup memory waits for all that was written there
// before. On an H200 a gradient of 16 states takes a sixteenth longer with four, and three tenths longer with one; with 16,
// registers run out.
constexpr int AT_ONCE = STEPS < 8 ? STEPS : 8;
// Channels of an item of a tile: two where four would leave threads without one.
constexpr int FEW = STEPS * CHANNELS < 4 * THREADS ? 2 : 4;
constexpr int COLUMNS = CHANNELS / FEW;
// In fours. Four rows of the sums of a simdgroup's channels lie in different banks.
constexpr int PITCH = (CHANNELS + 32 / LANES + 3) / 4;
// The steps after which the next ones are asked for: those that are behind take no more registers.
constexpr int ASKED_AT = STEPS / 8 * 4;
constexpr int ITEMS = (STEPS * COLUMNS + THREADS - 1) / THREADS;
// Fours of the rows of b and c, and of their sums.
constexpr int QUADS = (STEPS * SIZE / 2 + THREADS - 1) / THREADS;
// What a lane has left of its 2 · STATES sums over the channels of its simdgroup.
constexpr int LEFT = 2 * STATES * LANES / 32;
typedef Few<float, FEW> Channels;
THREADGROUP_ARRAY(float4, moves, [STEPS][CHANNELS / 2]);
THREADGROUP_ARRAY(float4, slopes, [STEPS][(CHANNELS + 3) / 4]);
// Of b and of c.
THREADGROUP_ARRAY(float4, gates, [2][STEPS][COPIES][SIZE / 4]);
THREADGROUP_ARRAY(float4, sums_of_b, [STEPS][PITCH]);
THREADGROUP_ARRAY(float4, sums_of_a, [STEPS][PITCH]);
THREADGROUP_ARRAY(float4, sums_of_c, [STEPS][PITCH]);
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
const uint first_state = lane * STATES;
// Where its n-th state lies: at n ^ order.
const uint order = copy * TURN;
// As one that carries: always the same channels.
const uint column = index % COLUMNS * FEW;
float added[FEW];
float skipped[FEW];
float dskip_of_few[FEW];
float dbias_of_few[FEW];
UNROLL
for (int v = 0; v < FEW; v++) {
  const bool there = column + v < present;
  added[v] = BIASED && there ? bias[origin + column + v] : 0.0f;
  skipped[v] = SKIPS && there ? skip[origin + column + v] : 0.0f;
  dskip_of_few[v] = 0.0f;
  dbias_of_few[v] = 0.0f;
}
// Whether all that is read and written is whole items.
const bool whole = is_of_few<T, FEW>(u + origin, channels) && is_of_few<T, FEW>(delta + origin, channels) &&
    is_of_few<T, FEW>(dy + origin, channels) && is_of_few<T, FEW>(du + origin, present) &&
    (!GATED || is_of_few<T, FEW>(z + origin, channels)) && is_of_few<T, 4>(b, states) && is_of_few<T, 4>(c, states) &&
    is_of_few<float, 4>(saved, states);

float rates[WIDTH][STATES];
float coming[WIDTH][STATES];
float da_held[WIDTH][STATES];
UNROLL
for (int k = 0; k < WIDTH; k++) {
  const uint channel = slot + k * SPAN;
  const bool there = channel < present;
  load_states<false, STATES>(rates[k], a + size_t(origin + channel) * states, first_state, states, there);
  const size_t row = size_t(sequence) * channels + origin + channel;
  load_states<false, STATES>(coming[k], dlast + row * states, first_state, states, there);
  turn_states<STATES, TURN>(rates[k], order);
  turn_states<STATES, TURN>(coming[k], order);
  for (int n = 0; n < STATES; n++) {
    rates[k][n] *= 1.44269504f;
    da_held[k][n] = 0.0f;
  }
}

const uint periods = (end - begin + PERIOD - 1) / PERIOD;
Asked<ITEMS, QUADS, FEW, WIDTH, STATES, T> asked;
{
  const uint last = periods > 0 ? periods - 1 : 0;
  if (whole) {
    ask_for_tile<true, THREADS, STEPS, CHANNELS, SIZE, GATED, T>(
        asked, u + origin, delta + origin, dy + origin, z + (GATED ? origin : 0),
        b + group * states, c + group * states, index, begin + last * PERIOD,
        end, end, channels, present, groups * states, states);
    ask_for_states<true, SPAN, WIDTH, STATES>(
        asked.held, saved + (size_t(first_saved + last) * channels + origin) * states,
        slot, first_state, states, periods > 0 ? present : 0);
  } else {
    ask_for_tile<false, THREADS, STEPS, CHANNELS, SIZE, GATED, T>(
        asked, u + origin, delta + origin, dy + origin, z + (GATED ? origin : 0),
        b + group * states, c + group * states, index, begin + last * PERIOD,
        end, end, channels, present, groups * states, states);
    ask_for_states<false, SPAN, WIDTH, STATES>(
        asked.held, saved + (size_t(first_saved + last) * channels + origin) * states,
        slot, first_state, states, periods > 0 ? present : 0);
  }
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
    float entered[ITEMS][FEW];
    float stepped[ITEMS][FEW];
    float of_step[ITEMS][FEW];
    float of_gate[ITEMS][FEW];
    UNROLL
    for (int i = 0; i < ITEMS; i++) {
      const uint below = row_of_item<THREADS, COLUMNS>(index, i);
      const Channels u_of = floats_of(asked.u[i]);
      const Channels delta_of = floats_of(asked.delta[i]);
      const Channels dy_of = floats_of(asked.dy[i]);
      Channels z_of;
      if (GATED) z_of = floats_of(asked.z[i]);
      float moved[2 * FEW];
      Channels slope;
      UNROLL
      for (int v = 0; v < FEW; v++) {
        entered[i][v] = u_of.values[v];
        const float raw = delta_of.values[v] + added[v];
        const Curve curve = SOFTPLUS ? softplus_of(raw) : curve_of(raw, 1.0f);
        of_step[i][v] = curve.slope;
        const float arriving = dy_of.values[v];
        const float gate = GATED ? z_of.values[v] : 0.0f;
        const Curve silu = GATED ? gated_by_sigmoid(gate, gate, 1.0f) : curve_of(1.0f, 0.0f);
        of_gate[i][v] = arriving * silu.slope;
        // A step of zero is none.
        const float step = column + v < present && tile + below < end ? curve.value : 0.0f;
        stepped[i][v] = step;
        moved[2 * v] = step;
        moved[2 * v + 1] = step * entered[i][v];
        slope.values[v] = arriving * silu.value;
      }
      if (is_among<THREADS, STEPS * COLUMNS>(index, i)) {
        UNROLL
        for (int v = 0; v < FEW / 2; v++) {
          moves[below][column / 2 + v] = quad_of(
              moved[4 * v], moved[4 * v + 1], moved[4 * v + 2], moved[4 * v + 3]);
        }
        put_few<FEW>(slopes[below], column / FEW, slope);
      }
    }
    place_gates<QUADS, THREADS, STEPS, SIZE, COPIES, TURN>(&gates[0][0][0][0], asked.gates, index);
    UNROLL
    for (int k = 0; k < WIDTH; k++) {
      if (visit == 1 - tiles) {
        for (int n = 0; n < STATES; n++) held[k][n] = asked.held[k][n];
        turn_states<STATES, TURN>(held[k], order);
      }
      for (int n = 0; n < STATES; n++) {
        const int at = k * STATES + n;
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
      read_states<STATES>(in, gates[0][s][copy], lane);
      UNROLL
      for (int k = 0; k < WIDTH; k++) {
        const float2 move = ((threadgroup const float2*)moves[s])[slot + k * SPAN];
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

    float of_simdgroup[STEPS][LEFT];
    float by_b[STEPS / 4][WIDTH];
    float by_a[STEPS / 4][WIDTH];
    float by_c[STEPS / 4][WIDTH];
    uint left = 0;
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
          read_states<STATES>(in, gates[0][s + r][copy], lane);
          read_states<STATES>(out, gates[1][s + r][copy], lane);
          UNROLL
          for (int k = 0; k < WIDTH; k++) {
            const float2 move = ((threadgroup const float2*)moves[s + r])[slot + k * SPAN];
            const float slope = ((threadgroup const float*)slopes[s + r])[slot + k * SPAN];
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
              // A sum that starts at its first term is one with what a halving adds to it.
              const float to_b = move.y * g;
              const float to_c = slope * reached[s + r + 1][k][n];
              over_channels[2 * n] = k == 0 ? to_b : over_channels[2 * n] + to_b;
              over_channels[2 * n + 1] = k == 0 ? to_c : over_channels[2 * n + 1] + to_c;
            }
          }
          left = sum_by_halves<2 * STATES, LANES, COPIES>(over_channels, lane_of_simd);
          for (int v = 0; v < LEFT; v++) of_simdgroup[s + r][v] = over_channels[v];
        }
        UNROLL
        for (int k = 0; k < WIDTH; k++) {
          by_b[s / 4][k] = sum_of_four<LANES>(of_b[k], lane);
          by_a[s / 4][k] = sum_of_four<LANES>(of_a[k], lane);
          by_c[s / 4][k] = GATED ? sum_of_four<LANES>(of_c[k], lane) : 0.0f;
        }
        if (s % AT_ONCE == 0) {
          UNROLL
          for (int r = 0; r < AT_ONCE; r++) {
            UNROLL
            for (int v = 0; v < LEFT; v++) {
              const uint which = left + v;
              const uint at = which % 2 * SIZE + first_state + (order ^ (which / 2));
              ((threadgroup float*)&partial[simdgroup][s + r][0])[at] = of_simdgroup[s + r][v];
            }
          }
          UNROLL
          for (int q = 0; q < AT_ONCE; q += 4) {
            UNROLL
            for (int k = 0; k < WIDTH; k++) {
              if (lane < 4) {
                const uint row = s + q + summed_of(lane);
                ((threadgroup float*)sums_of_b[row])[slot + k * SPAN] = by_b[(s + q) / 4][k];
                ((threadgroup float*)sums_of_a[row])[slot + k * SPAN] = by_a[(s + q) / 4][k];
                if (GATED) ((threadgroup float*)sums_of_c[row])[slot + k * SPAN] = by_c[(s + q) / 4][k];
              }
            }
          }
        }
      }
      if (s == ASKED_AT) {
        // Nothing is asked for after the last.
        const bool within = TILES > 1 && visit + 1 < tiles;
        const uint next = within ? start + (tiles - 1 - (visit < -1 ? -visit - 1 : visit + 1)) * STEPS
                                 : (period > 0 ? start - PERIOD : end);
        const uint end_of_back = TILES == 1 || (within && visit >= -1) ? end : 0;
        if (whole) {
          ask_for_tile<true, THREADS, STEPS, CHANNELS, SIZE, GATED, T>(
              asked, u + origin, delta + origin, dy + origin, z + (GATED ? origin : 0),
              b + group * states, c + group * states, index, next,
              end, end_of_back, channels, present, groups * states, states);
          ask_for_states<true, SPAN, WIDTH, STATES>(
              asked.held, saved + (size_t(first_saved + (period > 0 ? period - 1 : 0)) * channels + origin) * states,
              slot, first_state, states, within || period == 0 ? 0 : present);
        } else {
          ask_for_tile<false, THREADS, STEPS, CHANNELS, SIZE, GATED, T>(
              asked, u + origin, delta + origin, dy + origin, z + (GATED ? origin : 0),
              b + group * states, c + group * states, index, next,
              end, end_of_back, channels, present, groups * states, states);
          ask_for_states<false, SPAN, WIDTH, STATES>(
              asked.held, saved + (size_t(first_saved + (period > 0 ? period - 1 : 0)) * channels + origin) * states,
              slot, first_state, states, within || period == 0 ? 0 : present);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (!back) continue;

    UNROLL
    for (int i = 0; i < ITEMS; i++) {
      const uint below = row_of_item<THREADS, COLUMNS>(index, i);
      if (is_among<THREADS, STEPS * COLUMNS>(index, i) && tile + below < end) {
        const Channels slope = few_at<FEW>(slopes[below], column / FEW);
        const Channels by_b = few_at<FEW>(sums_of_b[below], column / FEW);
        const Channels by_a = few_at<FEW>(sums_of_a[below], column / FEW);
        Channels by_c;
        if (GATED) by_c = few_at<FEW>(sums_of_c[below], column / FEW);
        Few<T, FEW> to_u;
        Few<T, FEW> to_delta;
        Few<T, FEW> to_z;
        UNROLL
        for (int v = 0; v < FEW; v++) {
          const float dstep = of_step[i][v] * (entered[i][v] * by_b.values[v] + 0.693147181f * by_a.values[v]);
          to_u.values[v] = T(stepped[i][v] * by_b.values[v] + skipped[v] * slope.values[v]);
          to_delta.values[v] = T(dstep);
          if (GATED) to_z.values[v] = T(of_gate[i][v] * (by_c.values[v] + skipped[v] * entered[i][v]));
          dskip_of_few[v] += slope.values[v] * entered[i][v];
          dbias_of_few[v] += dstep;
        }
        const uint row = (tile + below) * channels + origin;
        if (whole) {
          write_few<true, T, FEW>(du + row, column, present, to_u);
          write_few<true, T, FEW>(ddelta + row, column, present, to_delta);
          if (GATED) write_few<true, T, FEW>(dz + row, column, present, to_z);
        } else {
          write_few<false, T, FEW>(du + row, column, present, to_u);
          write_few<false, T, FEW>(ddelta + row, column, present, to_delta);
          if (GATED) write_few<false, T, FEW>(dz + row, column, present, to_z);
        }
      }
    }
    UNROLL
    for (int i = 0; i < QUADS; i++) {
      const uint below = row_of_item<THREADS, SIZE / 2>(index, i);
      const uint quad = column_of_item<THREADS, SIZE / 2>(index, i);
      if (is_among<THREADS, STEPS * SIZE / 2>(index, i) && tile + below < end) {
        const float4 part = partial[0][below][quad];
        Chunk<float> sum;
        sum.values[0] = part.x;
        sum.values[1] = part.y;
        sum.values[2] = part.z;
        sum.values[3] = part.w;
        UNROLL
        for (int by = 1; by < THREADS / 32; by++) {
          const float4 more = partial[by][below][quad];
          sum.values[0] += more.x;
          sum.values[1] += more.y;
          sum.values[2] += more.z;
          sum.values[3] += more.w;
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
  turn_states<STATES, TURN>(da_held[k], order);
  turn_states<STATES, TURN>(coming[k], order);
  store_states<false, STATES>(da + row, da_held[k], first_state, states, channel < present);
  store_states<false, STATES>(dstate + row, coming[k], first_state, states, channel < present);
}
// Lanes that carry the same channels lie COLUMNS apart.
UNROLL
for (int v = 0; v < FEW; v++) {
  UNROLL
  for (int mask = COLUMNS; mask < 32; mask *= 2) {
    dskip_of_few[v] += simd_shuffle_xor(dskip_of_few[v], ushort(mask));
    dbias_of_few[v] += simd_shuffle_xor(dbias_of_few[v], ushort(mask));
  }
  if (lane_of_simd < COLUMNS) {
    kept[0][simdgroup * CHANNELS + column + v] = dskip_of_few[v];
    kept[1][simdgroup * CHANNELS + column + v] = dbias_of_few[v];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (index < present) {
  float dskip_sum = 0.0f;
  float dbias_sum = 0.0f;
  for (int by = 0; by < THREADS / 32; by++) {
    dskip_sum += kept[0][by * CHANNELS + index];
    dbias_sum += kept[1][by * CHANNELS + index];
  }
  const size_t at = size_t(sequence) * channels + origin + index;
  dskip[at] = dskip_sum;
  dbias[at] = dbias_sum;
}
if (!GATED && threadgroup_position_in_grid.x == 0 && sequence == 0 && index == 0) dz[0] = T(0.0f);

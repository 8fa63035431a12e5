// Queries over keys of E and values of F, sixteen keys at once, by products of tiles of numbers of 16 bits.

// Neighbours: the first in the lower half.
METAL_FUNC uint lows(uint a, uint b) { return (a & 0xffffu) | b << 16; }
METAL_FUNC uint highs(uint a, uint b) { return a >> 16 | (b & 0xffff0000u); }

// Two neighbours of a part as numbers of T.
template <typename T, typename E, int COUNT>
METAL_FUNC uint pair_of(thread const Part<E, COUNT>& part, int pair) {
  if (sizeof(E) == 2) return part.words[pair];
  const T first = T(value_of(part.bits(2 * pair), E()));
  const T second = T(value_of(part.bits(2 * pair + 1), E()));
  return bits_of(first) | bits_of(second) << 16;
}

#ifndef METAL_CUDA
template <typename T>
METAL_FUNC float half_of(uint pair, int which) {
  return value_of(which == 0 ? pair & 0xffffu : pair >> 16, T());
}
#endif

// Adds to `sum`, 16 by 8, the product of `left`, 16 by 16, and the 16 by 8 of `upper` and `lower`, as the matrix
// instructions of NVIDIA's GPUs share them out: with g = lane / 4 and t = lane % 4, sum[2 i + j] is at row g + 8 i and
// column 2 t + j; left[i + 2 j] holds row g + 8 i, columns 2 t + 8 j and the next; upper rows 2 t and the next of column
// g; lower the same 8 rows below. Elsewhere lanes ask each other.
template <typename T>
METAL_FUNC void multiply_shared(thread float* sum, thread const uint* left, uint upper, uint lower, uint lane) {
#ifdef METAL_CUDA
  metal::multiply_add(sum, left, upper, lower, T());
#else
  const uint4 own_rows = uint4(left[0], left[1], left[2], left[3]);
  const uint2 own_column = uint2(upper, lower);
  for (uint owner = 0; owner < 4; owner++) {
    const uint4 rows = simd_shuffle(own_rows, lane / 4 * 4 + owner);
    for (int j = 0; j < 2; j++) {
      const uint2 column = simd_shuffle(own_column, (lane % 4 * 2 + j) * 4 + owner);
      for (int i = 0; i < 2; i++) {
        sum[j] += half_of<T>(rows.x, i) * half_of<T>(column.x, i);
        sum[j] += half_of<T>(rows.z, i) * half_of<T>(column.y, i);
        sum[2 + j] += half_of<T>(rows.y, i) * half_of<T>(column.x, i);
        sum[2 + j] += half_of<T>(rows.w, i) * half_of<T>(column.y, i);
      }
    }
  }
#endif
}

// Of 8 by 8 numbers of 16 bits, of which lane 4 r + c holds those of row r at columns 2 c and 2 c + 1, the transpose.
METAL_FUNC uint transposed(uint pair, uint lane) {
#ifdef METAL_CUDA
  return metal::transpose_quarter(pair);
#else
  const uint first = simd_shuffle(pair, lane % 4 * 8 + lane / 8);
  const uint second = simd_shuffle(pair, lane % 4 * 8 + 4 + lane / 8);
  return lane / 4 % 2 == 0 ? lows(first, second) : highs(first, second);
#endif
}

// Scores are kept keys by rows and sums values by rows, 8 rows a tile, so that all that is loaded is a left factor, of
// which a lane's share are neighbours in memory: the order of what is summed over is free, and so is that of the sums.
template <typename T, typename E, typename F, int SIZE, int VALUE_SIZE, int TILES>
struct TileSweep {
  enum : int {
    ROWS = 8 * TILES,
    TILES_OF_ROWS = TILES,
    ROWS_OF_LANE = 2,
    KEYS = 16,
    KEY_PART = 8,
    VALUE_PART = 8,
    KEY_PARTS = (SIZE + 31) / 32,
    VALUE_PARTS = (VALUE_SIZE + 63) / 64
  };

  uint queries[TILES][KEY_PARTS][4];
  Row rows[TILES][2];
  float peaks[TILES][2];
  float totals[TILES][2];
  float sums[TILES][4 * VALUE_PARTS][4];

  // Which of the rows that a lane's sums are for.
  METAL_FUNC int row(int tile, int which, uint lane) const { return tile * 8 + lane % 4 * 2 + which; }

  // The row whose query a lane holds a share of.
  METAL_FUNC int query_row(int tile, uint lane) const { return tile * 8 + lane / 4; }

  template <typename Pointer>
  METAL_FUNC void take_query(int tile, Pointer query, long step, bool real, uint lane) {
    UNROLL
    for (int p = 0; p < KEY_PARTS; p++) {
      Part<T, 8> part;
      part.clear();
      if (real) load_part<false, SIZE>(part, query, p * 32 + lane % 4 * 8, step);
      for (int w = 0; w < 4; w++) queries[tile][p][w] = part.words[w];
    }
  }

  METAL_FUNC void begin() {
    UNROLL
    for (int n = 0; n < TILES; n++) {
      for (int c = 0; c < 2; c++) {
        peaks[n][c] = -INFINITY;
        totals[n][c] = 0.0f;
      }
      UNROLL
      for (int i = 0; i < 4 * VALUE_PARTS; i++) {
        for (int e = 0; e < 4; e++) sums[n][i][e] = 0.0f;
      }
    }
  }

  template <bool FAST, typename Source>
  METAL_FUNC void load_keys(
      thread Part<E, 8> (&parts)[2][KEY_PARTS], Source keys, uint start, uint end, uint lane) const {
    UNROLL
    for (int i = 0; i < 2; i++) {
      const uint key = start + lane / 4 + 8 * i;
      const auto at = keys.template row<KEYS>(key < end ? key : end - 1);
      UNROLL
      for (int p = 0; p < KEY_PARTS; p++) {
        load_part<FAST, SIZE>(parts[i][p], at, p * 32 + lane % 4 * 8, keys.step);
      }
    }
  }

  // Beyond the end the last value stands, which is loaded anyway: zero times NaN is NaN.
  template <bool FAST, typename Source>
  METAL_FUNC void load_values(
      thread Part<F, 8> (&parts)[4][VALUE_PARTS], Source values, uint start, uint end, uint lane) const {
    UNROLL
    for (int i = 0; i < 4; i++) {
      const uint key = start + lane % 4 * 2 + i % 2 + i / 2 * 8;
      const auto at = values.template row<KEYS>(key < end ? key : end - 1);
      UNROLL
      for (int p = 0; p < VALUE_PARTS; p++) {
        load_part<FAST, VALUE_SIZE>(parts[i][p], at, p * 64 + lane / 4 * 8, values.step);
      }
    }
  }

  METAL_FUNC void multiply_keys(
      thread float (&scores)[TILES][4], thread const Part<E, 8> (&parts)[2][KEY_PARTS], uint lane) const {
    UNROLL
    for (int n = 0; n < TILES; n++) {
      for (int e = 0; e < 4; e++) scores[n][e] = 0.0f;
    }
    UNROLL
    for (int p = 0; p < KEY_PARTS; p++) {
      UNROLL
      for (int s = 0; s < 2; s++) {
        uint left[4];
        for (int j = 0; j < 4; j++) left[j] = pair_of<T>(parts[j % 2][p], 2 * s + j / 2);
        UNROLL
        for (int n = 0; n < TILES; n++) {
          multiply_shared<T>(scores[n], left, queries[n][p][2 * s], queries[n][p][2 * s + 1], lane);
        }
      }
    }
  }

  // Turns products into weights relative to the peaks, which may grow.
  template <typename Source>
  METAL_FUNC void weigh(
      thread float (&scores)[TILES][4], Source keys, uint start, uint end, float rate, float cap, uint lane) {
    float scales[2];
    for (int i = 0; i < 2; i++) {
      const uint key = start + lane / 4 + 8 * i;
      scales[i] = keys.scale(key < end ? key : end - 1);
    }
    UNROLL
    for (int n = 0; n < TILES; n++) {
      float tops[2];
      for (int c = 0; c < 2; c++) tops[c] = peaks[n][c];
      UNROLL
      for (int e = 0; e < 4; e++) {
        const uint key = start + lane / 4 + e / 2 * 8;
        const float score = scored(scores[n][e] * scales[e / 2], rate, cap);
        scores[n][e] = seen(score, rows[n][e % 2], key, end);
        tops[e % 2] = scores[n][e] > tops[e % 2] ? scores[n][e] : tops[e % 2];
      }
      UNROLL
      for (int c = 0; c < 2; c++) {
        for (ushort mask = 4; mask < 32; mask *= 2) {
          const float other = simd_shuffle_xor(tops[c], mask);
          tops[c] = other > tops[c] ? other : tops[c];
        }
      }
      if (simd_any(tops[0] > peaks[n][0] || tops[1] > peaks[n][1])) {
        float factors[2];
        for (int c = 0; c < 2; c++) {
          factors[c] = power(peaks[n][c], tops[c]);
          totals[n][c] *= factors[c];
          peaks[n][c] = tops[c];
        }
        UNROLL
        for (int i = 0; i < 4 * VALUE_PARTS; i++) {
          for (int e = 0; e < 4; e++) sums[n][i][e] *= factors[e % 2];
        }
      }
      UNROLL
      for (int e = 0; e < 4; e++) {
        scores[n][e] = power(scores[n][e], peaks[n][e % 2]);
        totals[n][e % 2] += scores[n][e];
      }
    }
  }

  // Weights, times the scales of their values, go in as two numbers of T, whose sum is as good as the f32 they stand for; but half
  // precision has nothing below 2^-25, so that a small weight of a value of a small scale may be lost.
  template <typename Source>
  METAL_FUNC void multiply_values(
      thread const float (&weights)[TILES][4],
      thread const Part<F, 8> (&parts)[4][VALUE_PARTS],
      Source values,
      uint start,
      uint end,
      uint lane) {
    uint right[TILES][4];
    UNROLL
    for (int i = 0; i < 2; i++) {
      const uint key = start + lane / 4 + 8 * i;
      const float scale = values.scale(key < end ? key : end - 1);
      UNROLL
      for (int n = 0; n < TILES; n++) {
        const float a = key < end ? weights[n][2 * i] * scale : 0.0f;
        const float b = key < end ? weights[n][2 * i + 1] * scale : 0.0f;
        const T high_a = T(a);
        const T high_b = T(b);
        const uint high = bits_of(high_a) | bits_of(high_b) << 16;
        const uint low = bits_of(T(a - float(high_a))) | bits_of(T(b - float(high_b))) << 16;
        right[n][i] = transposed(high, lane);
        right[n][2 + i] = transposed(low, lane);
      }
    }
    UNROLL
    for (int p = 0; p < VALUE_PARTS; p++) {
      UNROLL
      for (int w = 0; w < 4; w++) {
        uint pairs[4];
        for (int i = 0; i < 4; i++) pairs[i] = pair_of<T>(parts[i][p], w);
        uint left[4];
        for (int j = 0; j < 2; j++) {
          left[2 * j] = lows(pairs[2 * j], pairs[2 * j + 1]);
          left[2 * j + 1] = highs(pairs[2 * j], pairs[2 * j + 1]);
        }
        UNROLL
        for (int n = 0; n < TILES; n++) {
          multiply_shared<T>(sums[n][4 * p + w], left, right[n][0], right[n][1], lane);
          multiply_shared<T>(sums[n][4 * p + w], left, right[n][2], right[n][3], lane);
        }
      }
    }
  }

  // Every `stride`-th sixteen keys from `first` on.
  template <bool FAST, typename Keys, typename Values>
  METAL_FUNC void walk(
      Keys keys, Values values, uint first, uint end, uint stride, float rate, float cap, uint lane) {
    Part<E, 8> key_parts[2][KEY_PARTS];
    if (first < end) {
      keys.template turn_to<KEYS>(first);
      load_keys<FAST>(key_parts, keys, first, end, lane);
    }
    for (uint start = first; start < end; start += stride) {
      Part<F, 8> value_parts[4][VALUE_PARTS];
      values.template turn_to<KEYS>(start);
      load_values<FAST>(value_parts, values, start, end, lane);
      float scores[TILES][4];
      multiply_keys(scores, key_parts, lane);
      if (start + stride < end) {
        keys.template turn_to<KEYS>(start + stride);
        load_keys<FAST>(key_parts, keys, start + stride, end, lane);
      }
      weigh(scores, keys, start, end, rate, cap, lane);
      multiply_values(scores, value_parts, values, start, end, lane);
    }
    UNROLL
    for (int n = 0; n < TILES; n++) {
      for (int c = 0; c < 2; c++) {
        for (ushort mask = 4; mask < 32; mask *= 2) totals[n][c] += simd_shuffle_xor(totals[n][c], mask);
      }
    }
  }

  METAL_FUNC void tell(threadgroup float* all_peaks, threadgroup float* all_totals, uint lane) const {
    if (lane >= 4) return;
    for (int n = 0; n < TILES; n++) {
      for (int c = 0; c < 2; c++) {
        all_peaks[row(n, c, lane)] = peaks[n][c];
        all_totals[row(n, c, lane)] = totals[n][c];
      }
    }
  }

  METAL_FUNC void add(threadgroup float* all, threadgroup const float* tops, bool is_first, uint lane) const {
    UNROLL
    for (int n = 0; n < TILES; n++) {
      UNROLL
      for (int i = 0; i < 4 * VALUE_PARTS; i++) {
        for (int e = 0; e < 4; e++) {
          const int r = row(n, e % 2, lane);
          const uint at = i / 4 * 64 + lane / 4 * 8 + i % 4 * 2 + e / 2;
          if (at >= uint(VALUE_SIZE)) continue;
          const float sum = sums[n][i][e] * power(peaks[n][e % 2], tops[r]);
          all[r * VALUE_SIZE + at] = is_first ? sum : all[r * VALUE_SIZE + at] + sum;
        }
      }
    }
  }
};

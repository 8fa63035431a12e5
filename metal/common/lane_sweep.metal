// Queries over keys, a few keys at once, each shared out over all lanes, for numbers of any type: keys of E and values of F.

template <typename T, typename E, typename F, int SIZE, int VALUE_SIZE, int TILES>
struct LaneSweep {
  enum : int {
    ROWS = TILES,
    TILES_OF_ROWS = TILES,
    ROWS_OF_LANE = 1,
    KEYS = 4,
    KEY_PART = SIZE <= 32 ? 1 : SIZE <= 64 ? 2 : SIZE <= 128 ? 4 : 8,
    VALUE_PART = VALUE_SIZE <= 32 ? 1 : VALUE_SIZE <= 64 ? 2 : VALUE_SIZE <= 128 ? 4 : 8
  };

  float queries[TILES][KEY_PART];
  Row rows[TILES][1];
  float peaks[TILES];
  float totals[TILES];
  float sums[TILES][VALUE_PART];

  METAL_FUNC int row(int tile, int, uint) const { return tile; }
  METAL_FUNC int query_row(int tile, uint) const { return tile; }

  template <typename Pointer>
  METAL_FUNC void take_query(int tile, Pointer query, long step, bool real, uint lane) {
    UNROLL
    for (int i = 0; i < KEY_PART; i++) {
      const uint at = lane * KEY_PART + i;
      queries[tile][i] = real && at < uint(SIZE) ? float(query[long(at) * step]) : 0.0f;
    }
  }

  METAL_FUNC void begin() {
    UNROLL
    for (int r = 0; r < TILES; r++) {
      peaks[r] = -INFINITY;
      totals[r] = 0.0f;
      for (int i = 0; i < VALUE_PART; i++) sums[r][i] = 0.0f;
    }
  }

  template <bool FAST, typename Keys, typename Values>
  METAL_FUNC void walk(
      Keys keys, Values values, uint first, uint end, uint stride, float rate, float cap, uint lane) {
    for (uint start = first; start < end; start += stride) {
      Part<E, KEY_PART> key_parts[KEYS];
      Part<F, VALUE_PART> value_parts[KEYS];
      keys.template turn_to<KEYS>(start);
      values.template turn_to<KEYS>(start);
      UNROLL
      for (int k = 0; k < KEYS; k++) {
        const uint key = start + k < end ? start + k : end - 1;
        load_part<FAST, SIZE>(key_parts[k], keys.template row<KEYS>(key), lane * KEY_PART, keys.step);
        load_part<FAST, VALUE_SIZE>(value_parts[k], values.template row<KEYS>(key), lane * VALUE_PART, values.step);
      }
      float scores[TILES][KEYS];
      UNROLL
      for (int k = 0; k < KEYS; k++) {
        const uint key = start + k < end ? start + k : end - 1;
        const float scale = keys.scale(key);
        UNROLL
        for (int r = 0; r < TILES; r++) {
          float product = 0.0f;
          for (int i = 0; i < KEY_PART; i++) product += queries[r][i] * value_of(key_parts[k].bits(i), E());
          scores[r][k] = seen(scored(simd_sum(product) * scale, rate, cap), rows[r][0], start + k, end);
        }
      }
      UNROLL
      for (int r = 0; r < TILES; r++) {
        float top = peaks[r];
        for (int k = 0; k < KEYS; k++) top = scores[r][k] > top ? scores[r][k] : top;
        const float factor = power(peaks[r], top);
        peaks[r] = top;
        totals[r] *= factor;
        for (int i = 0; i < VALUE_PART; i++) sums[r][i] *= factor;
      }
      UNROLL
      for (int k = 0; k < KEYS; k++) {
        // Nothing may be made of what lies beyond the end: it is what the end holds, and weighs nothing.
        const float scale = values.scale(start + k < end ? start + k : end - 1);
        UNROLL
        for (int r = 0; r < TILES; r++) {
          const float weight = power(scores[r][k], peaks[r]);
          totals[r] += weight;
          for (int i = 0; i < VALUE_PART; i++) {
            sums[r][i] += weight * scale * value_of(value_parts[k].bits(i), F());
          }
        }
      }
    }
  }

  METAL_FUNC void tell(threadgroup float* all_peaks, threadgroup float* all_totals, uint lane) const {
    if (lane > 0) return;
    for (int r = 0; r < TILES; r++) {
      all_peaks[r] = peaks[r];
      all_totals[r] = totals[r];
    }
  }

  METAL_FUNC void add(threadgroup float* all, threadgroup const float* tops, bool is_first, uint lane) const {
    UNROLL
    for (int r = 0; r < TILES; r++) {
      for (int i = 0; i < VALUE_PART; i++) {
        const uint at = lane * VALUE_PART + i;
        if (at >= uint(VALUE_SIZE)) continue;
        const float sum = sums[r][i] * power(peaks[r], tops[r]);
        all[r * VALUE_SIZE + at] = is_first ? sum : all[r * VALUE_SIZE + at] + sum;
      }
    }
  }
};

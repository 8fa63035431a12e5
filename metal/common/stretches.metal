// A row shared out over simdgroups, a stretch each, and what looks at its elements.

// The first element of the stretch of each simdgroup: a whole number of loads apart.
template <typename T, int SIMDS>
METAL_FUNC uint stretch_of(uint length) {
  constexpr uint STEP = 32 * Chunk<T>::SIZE;
  return ((length + SIMDS - 1) / SIMDS + STEP - 1) / STEP * STEP;
}

// Shows a simdgroup's stretch to what looks at its elements; and -inf, which may not be drawn, beyond its end.
template <typename T, int SIMDS, int HELD = 4, typename Pointer, typename Visitor>
METAL_FUNC void visit(Pointer row, uint length, uint simdgroup, uint lane, thread Visitor& visitor) {
  constexpr uint SIZE = Chunk<T>::SIZE;
  constexpr uint STEP = 32 * SIZE;
  const uint stretch = stretch_of<T, SIMDS>(length);
  const uint start = simdgroup * stretch;
  const uint end = start + stretch < length ? start + stretch : length;
  const bool whole = is_whole<T>(row, length);
  for (uint first = start; first < end; first += HELD * STEP) {
    Chunk<T> held[HELD];
    if (whole && first + HELD * STEP <= end) {
      UNROLL
      for (int c = 0; c < HELD; c++) held[c] = load_chunk<T>(row + (first + lane * SIZE) + c * STEP);
    } else {
      for (int c = 0; c < HELD; c++) {
        held[c] = read_chunk<T>(row, first + c * STEP + lane * SIZE, end, T(-INFINITY));
      }
    }
    UNROLL
    for (int c = 0; c < HELD; c++) {
      float values[SIZE];
      UNROLL
      for (uint i = 0; i < SIZE; i++) values[i] = float(held[c].values[i]);
      visitor.look(values, first + c * STEP + lane * SIZE);
    }
  }
}

// The largest element and the first of it; and for BEFORE the sum of exponentials, NaN if an element is.
template <bool BEFORE>
struct Best {
  float value;
  uint index;
  float total;

  METAL_FUNC void see(float x, uint at) {
    const float real = real_of(x);
    const bool better = real > value;
    if (BEFORE) {
      const float gap = metal::fabs(x - metal::max(value, -LARGEST));
      const float part = metal::fast::exp2(gap * -M_LOG2E_F);
      total = better ? total * part + 1.0f : total + part;
    }
    value = better ? real : value;
    index = better ? at : index;
  }

  template <int SIZE>
  METAL_FUNC void look(thread const float (&values)[SIZE], uint at) {
    UNROLL
    for (int i = 0; i < SIZE; i++) see(values[i], at + i);
  }
};

// The weight of an element, or one for each.
METAL_FUNC uint64_t amount_of(bool mass, uint key) {
  return mass ? weight_of(key) : uint64_t(1);
}

// Which bin of some keys a key is in: at first by equal steps of d, for the exponents of its bits would crowd.
struct Bins {
  uint low;
  uint shift;
  float scale;

  METAL_FUNC uint of(uint key) const {
    if (scale > 0.0f) {
      const float bin = as_type<float>(key) * scale;
      return bin < float(BINS) ? uint(bin) : uint(BINS);
    }
    return (key - low) >> shift;
  }
};

// Bins of equal numbers of keys.
METAL_FUNC Bins fine_bins(uint low, uint high) {
  Bins bins;
  bins.low = low;
  bins.shift = 0;
  bins.scale = 0.0f;
  while (((high - low) >> bins.shift) >= uint(BINS)) bins.shift++;
  return bins;
}

// The smallest key from `low` on, up to `high` + 1, of a bin that is `bin` or later.
METAL_FUNC uint first_key_of(Bins bins, uint bin, uint low, uint high) {
  uint end = high + 1;
  while (low < end) {
    const uint middle = low + (end - low) / 2;
    if (bins.of(middle) >= bin) {
      end = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Adds elements to their bins, and adds up those within a limit.
struct Histogram {
  Scored scored;
  bool mass;
  Rank limit;
  uint low;
  uint high;
  // No key after this one is in a bin.
  uint furthest;
  Bins bins;
  threadgroup atomic_uint* lows;
  threadgroup atomic_uint* highs;
  uint64_t total;

  METAL_FUNC bool has(uint key, uint index) const {
    return (key < limit.key) | ((key == limit.key) & (index <= limit.index));
  }

  METAL_FUNC void add(uint key) {
    if (key < low || key > high) return;
    const uint bin = bins.of(key);
    if (bin >= uint(BINS)) return;
    if (mass) {
      add_to(lows + bin, highs + bin, weight_of(key));
    } else {
      atomic_fetch_add_explicit(lows + bin, 1u, memory_order_relaxed);
    }
  }

  // What all elements take is done for some of them at once, and what few do, for each.
  template <int SIZE>
  METAL_FUNC void look(thread const float (&values)[SIZE], uint at) {
    uint keys[SIZE];
    uint nearest = BEYOND;
    UNROLL
    for (int i = 0; i < SIZE; i++) {
      keys[i] = scored.key(values[i]);
      keys[i] = has(keys[i], at + i) ? keys[i] : uint(BEYOND);
      nearest = metal::min(nearest, keys[i]);
    }
    if (nearest > limit.key) return;
    if (mass) {
      total += sum_of_weights(keys, nearest);
    } else {
      UNROLL
      for (int i = 0; i < SIZE; i++) total += keys[i] <= limit.key ? 1 : 0;
    }
    if (nearest > furthest) return;
    UNROLL
    for (int i = 0; i < SIZE; i++) add(keys[i]);
  }
};

// Lists the elements of some keys, and adds up the weights of those before.
struct Collector {
  Scored scored;
  Rank limit;
  uint low;
  uint high;
  uint floor;
  List list;
  uint64_t sure;

  METAL_FUNC void add(uint key, uint index) {
    if (key > high || (key == limit.key && index > limit.index)) return;
    if (key >= low) {
      list.add(rank_of(key, index), LISTED);
    } else if (key <= floor) {
      sure += weight_of(key);
    }
  }

  template <int SIZE>
  METAL_FUNC void look(thread const float (&values)[SIZE], uint at) {
    uint keys[SIZE];
    uint nearest = BEYOND;
    UNROLL
    for (int i = 0; i < SIZE; i++) {
      keys[i] = scored.key(values[i]);
      nearest = metal::min(nearest, keys[i]);
    }
    if (nearest > high) return;
    UNROLL
    for (int i = 0; i < SIZE; i++) add(keys[i], at + i);
  }
};

// Weights within a limit; or how many elements have one key.
template <bool EQUAL>
struct Counter {
  Scored scored;
  Rank limit;
  uint64_t total;

  METAL_FUNC uint64_t amount(float x, uint index) const {
    const uint key = scored.key(x);
    if (EQUAL) return key == limit.key ? 1 : 0;
    return limit.before(rank_of(key, index)) ? 0 : weight_of(key);
  }

  template <int SIZE>
  METAL_FUNC void look(thread const float (&values)[SIZE], uint at) {
    if (EQUAL) {
      for (int i = 0; i < SIZE; i++) total += amount(values[i], at + i);
      return;
    }
    uint keys[SIZE];
    uint nearest = BEYOND;
    UNROLL
    for (int i = 0; i < SIZE; i++) {
      const uint key = scored.key(values[i]);
      keys[i] = limit.before(rank_of(key, at + i)) ? uint(BEYOND) : key;
      nearest = metal::min(nearest, keys[i]);
    }
    total += sum_of_weights(keys, nearest);
  }
};

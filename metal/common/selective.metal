// What the two kernels of the selective scan share. A channel has LANES neighbouring lanes, each with STATES of its
// states: two, four or eight.

template <bool SOFTPLUS>
METAL_FUNC float step_of(float delta) {
  return SOFTPLUS ? softplus_of(delta).value : delta;
}

// Where a thread's i-th item is of many rows of COLUMNS, and whether it is among the first COUNT.
template <int THREADS, int COLUMNS>
METAL_FUNC uint row_of_item(uint index, int i) {
  return THREADS % COLUMNS == 0 ? index / COLUMNS + i * (THREADS / COLUMNS) : (index + i * THREADS) / COLUMNS;
}

template <int THREADS, int COLUMNS>
METAL_FUNC uint column_of_item(uint index, int i) {
  return THREADS % COLUMNS == 0 ? index % COLUMNS : (index + i * THREADS) % COLUMNS;
}

template <int THREADS, int COUNT>
METAL_FUNC bool is_among(uint index, int i) {
  return COUNT % THREADS == 0 || index + i * THREADS < COUNT;
}

METAL_FUNC float4 quad_of(float x, float y, float z, float w) {
  float4 quad;
  quad.x = x;
  quad.y = y;
  quad.z = z;
  quad.w = w;
  return quad;
}

// Neighbours, which are loaded and stored at once where they lie on a whole number of them: two or four.
template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T)) Few {
  T values[COUNT];
};

// Such as they are loaded. On an NVIDIA GPU as words: what takes numbers of 16 bits out of them waits for the load.
template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T)) Packed {
#ifdef METAL_CUDA
  uint words[COUNT * sizeof(T) / 4];
#else
  T values[COUNT];
#endif
};

template <typename T, int COUNT>
METAL_FUNC Packed<T, COUNT> packed_of(Few<T, COUNT> few) {
  Packed<T, COUNT> packed;
#ifdef METAL_CUDA
  memcpy(packed.words, few.values, sizeof(packed));
#else
  for (int i = 0; i < COUNT; i++) packed.values[i] = few.values[i];
#endif
  return packed;
}

template <typename T, int COUNT>
METAL_FUNC Few<float, COUNT> floats_of(Packed<T, COUNT> packed) {
  Few<float, COUNT> few;
#ifdef METAL_CUDA
  T values[COUNT];
  memcpy(values, packed.words, sizeof(packed));
  for (int i = 0; i < COUNT; i++) few.values[i] = float(values[i]);
#else
  for (int i = 0; i < COUNT; i++) few.values[i] = float(packed.values[i]);
#endif
  return few;
}

// Whether rows from here on, of so many values each, are made of whole ones.
template <typename T, int COUNT, typename Pointer>
METAL_FUNC bool is_of_few(Pointer rows, uint length) {
#ifdef METAL_CUDA
  if (reinterpret_cast<unsigned long long>(rows) % (COUNT * sizeof(T)) != 0) return false;
#endif
  return length % COUNT == 0;
}

// Those from `first` on of a row of `length`, all there or none where WHOLE; zeros beyond its end, or if it is not there.
template <bool WHOLE, typename T, int COUNT, typename Pointer>
METAL_FUNC Packed<T, COUNT> read_few(Pointer row, uint first, uint length, bool there) {
  Few<T, COUNT> few;
  UNROLL
  for (int i = 0; i < COUNT; i++) few.values[i] = T(0.0f);
#ifdef METAL_CUDA
  if (WHOLE) {
    Packed<T, COUNT> packed = packed_of(few);
    if (there && first < length) packed = *reinterpret_cast<const Packed<T, COUNT>*>(row + first);
    return packed;
  }
#endif
  UNROLL
  for (int i = 0; i < COUNT; i++) {
    if (there && first + i < length) few.values[i] = row[first + i];
  }
  return packed_of(few);
}

// Writes them, in the same cases.
template <bool WHOLE, typename T, int COUNT>
METAL_FUNC void write_few(device T* row, uint first, uint length, Few<T, COUNT> few) {
#ifdef METAL_CUDA
  if (WHOLE) {
    if (first < length) *reinterpret_cast<Packed<T, COUNT>*>(row + first) = packed_of(few);
    return;
  }
#endif
  UNROLL
  for (int i = 0; i < COUNT; i++) {
    if (first + i < length) row[first + i] = few.values[i];
  }
}

// The which-th of a row of them in threadgroup memory, and its place.
template <int COUNT>
METAL_FUNC Few<float, COUNT> few_at(threadgroup const float4* row, uint which) {
  Few<float, COUNT> few;
  if (COUNT == 2) {
    const float2 pair = ((threadgroup const float2*)row)[which];
    few.values[0] = pair.x;
    few.values[1] = pair.y;
  } else {
    const float4 quad = row[which];
    few.values[0] = quad.x;
    few.values[1] = quad.y;
    few.values[COUNT - 2] = quad.z;
    few.values[COUNT - 1] = quad.w;
  }
  return few;
}

template <int COUNT>
METAL_FUNC void put_few(threadgroup float4* row, uint which, Few<float, COUNT> few) {
  if (COUNT == 2) {
    float2 pair;
    pair.x = few.values[0];
    pair.y = few.values[1];
    ((threadgroup float2*)row)[which] = pair;
  } else {
    row[which] = quad_of(few.values[0], few.values[1], few.values[COUNT - 2], few.values[COUNT - 1]);
  }
}

// A thread's share of STEPS rows from `row` on of the channels of a group, of which `present` are there; zeros beyond
// those and from row `end` on.
template <bool WHOLE, int ITEMS, int THREADS, int STEPS, int COLUMNS, int FEW, typename T, typename Pointer>
METAL_FUNC void ask_for_channels(
    thread Packed<T, FEW>* items, Pointer from, uint index, uint row, uint end, uint channels, uint present) {
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint at = row + row_of_item<THREADS, COLUMNS>(index, i);
    const bool there = is_among<THREADS, STEPS * COLUMNS>(index, i) && at < end;
    items[i] = read_few<WHOLE, T, FEW>(
        from + at * channels, column_of_item<THREADS, COLUMNS>(index, i) * FEW, present, there);
  }
}

// The same of b, and of c for the steps before `end_of_c`, one below the other, each row of SIZE states.
template <bool WHOLE, int ITEMS, int THREADS, int STEPS, int SIZE, typename T, typename Pointer>
METAL_FUNC void ask_for_gates(
    thread Packed<T, 4>* items, Pointer b, Pointer c, uint index, uint row, uint end, uint end_of_c, uint stride,
    uint states) {
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint below = row_of_item<THREADS, SIZE / 4>(index, i);
    const bool of_c = below >= STEPS;
    const uint at = row + (of_c ? below - STEPS : below);
    const bool there = is_among<THREADS, STEPS * SIZE / 2>(index, i) && at < (of_c ? end_of_c : end);
    items[i] = read_few<WHOLE, T, 4>(
        (of_c ? c : b) + at * stride, column_of_item<THREADS, SIZE / 4>(index, i) * 4, states, there);
  }
}

// Puts them into threadgroup memory, in f32, the n-th state of a row's i-th copy at n ^ (i · TURN).
template <int ITEMS, int THREADS, int STEPS, int SIZE, int COPIES, int TURN, typename T>
METAL_FUNC void place_gates(threadgroup float4* to, thread const Packed<T, 4>* items, uint index) {
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint row = row_of_item<THREADS, SIZE / 4>(index, i);
    const uint quad = column_of_item<THREADS, SIZE / 4>(index, i);
    const Few<float, 4> few = floats_of(items[i]);
    UNROLL
    for (int copy = 0; copy < COPIES; copy++) {
      const int turn = copy * TURN;
      const int at = turn % 4;
      if (is_among<THREADS, STEPS * SIZE / 2>(index, i)) {
        to[(row * COPIES + copy) * (SIZE / 4) + (quad ^ (turn / 4))] =
            quad_of(few.values[at], few.values[1 ^ at], few.values[2 ^ at], few.values[3 ^ at]);
      }
    }
  }
}

// A lane's states out of a row of all.
template <int STATES>
METAL_FUNC void read_states(thread float* states, threadgroup const float4* row, uint lane) {
  if (STATES == 2) {
    const float2 pair = ((threadgroup const float2*)row)[lane];
    states[0] = pair.x;
    states[1] = pair.y;
  }
  UNROLL
  for (int q = 0; q < STATES / 4; q++) {
    const float4 quad = row[lane * (STATES / 4) + q];
    states[4 * q] = quad.x;
    states[4 * q + 1] = quad.y;
    states[4 * q + 2] = quad.z;
    states[4 * q + 3] = quad.w;
  }
}

// A lane's states of one channel, which begin at `first` of those in memory; zeros beyond N or where there is no such
// channel.
template <bool WHOLE, int STATES, typename Pointer>
METAL_FUNC void load_states(thread float* states, Pointer row, uint first, uint size, bool there) {
  constexpr int FEW = STATES < 4 ? STATES : 4;
  UNROLL
  for (int q = 0; q < STATES; q += FEW) {
    const Few<float, FEW> few = floats_of(read_few<WHOLE, float, FEW>(row, first + q, size, there));
    UNROLL
    for (int n = 0; n < FEW; n++) states[q + n] = few.values[n];
  }
}

template <bool WHOLE, int STATES>
METAL_FUNC void store_states(device float* row, thread const float* states, uint first, uint size, bool there) {
  constexpr int FEW = STATES < 4 ? STATES : 4;
  if (there) {
    UNROLL
    for (int q = 0; q < STATES; q += FEW) {
      Few<float, FEW> few;
      UNROLL
      for (int n = 0; n < FEW; n++) few.values[n] = states[q + n];
      write_few<WHOLE, float, FEW>(row, first + q, size, few);
    }
  }
}

// Swaps a lane's states so that what was the n-th is the n ^ turn-th, for a `turn` that is a multiple of TURN.
template <int STATES, int TURN>
METAL_FUNC void turn_states(thread float* states, uint turn) {
  UNROLL
  for (int bit = TURN; bit < STATES; bit *= 2) {
    const bool turned = (turn & bit) != 0;
    UNROLL
    for (int n = 0; n < STATES; n++) {
      if ((n & bit) == 0) {
        const float lower = states[n];
        const float upper = states[n + bit];
        states[n] = turned ? upper : lower;
        states[n + bit] = turned ? lower : upper;
      }
    }
  }
}

// Of four values the sum over the LANES lanes of a channel, four or more: a lane gets the one that `summed_of` names.
template <int LANES>
METAL_FUNC float sum_of_four(thread const float* values, uint lane) {
  const bool odd = (lane & 1) != 0;
  const bool upper = (lane & 2) != 0;
  const float first = (odd ? values[2] : values[0]) + simd_shuffle_xor(odd ? values[0] : values[2], 1);
  const float second = (odd ? values[3] : values[1]) + simd_shuffle_xor(odd ? values[1] : values[3], 1);
  float sum = (upper ? second : first) + simd_shuffle_xor(upper ? first : second, 2);
  UNROLL
  for (int mask = 4; mask < LANES; mask *= 2) sum += simd_shuffle_xor(sum, ushort(mask));
  return sum;
}

METAL_FUNC uint summed_of(uint lane) {
  return 2 * (lane & 1) + (lane >> 1 & 1);
}

// Sums over the channels of a simdgroup, each lane giving COUNT values for its own: a lane is left with the sums of
// COUNT · LANES / 32 of them, from the returned one on. Lanes are halved again and again, the lower ones keep the first
// half of the values, the upper ones the second. Each of the first halvings, as often as COPIES can be halved, finds the
// halves of the upper lanes' values swapped already: all keep the first, and nothing is chosen.
template <int COUNT, int LANES, int COPIES>
METAL_FUNC uint sum_by_halves(thread float* values, uint lane) {
  uint left = 0;
  int count = COUNT / 2;
  UNROLL
  for (int mask = 16; mask >= LANES; mask /= 2) {
    const bool turned = mask > 16 / COPIES;
    const bool upper = !turned && (lane & mask) != 0;
    UNROLL
    for (int i = 0; i < COUNT / 2; i++) {
      if (i < count) {
        const float kept = upper ? values[i + count] : values[i];
        const float given = upper ? values[i] : values[i + count];
        values[i] = kept + simd_shuffle_xor(given, ushort(mask));
      }
    }
    left += upper ? count : 0;
    count /= 2;
  }
  return left;
}

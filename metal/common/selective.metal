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

// A thread's share of ROWS rows from `row` on, each of COLUMNS columns of which `columns` are there; zeros beyond those
// and from row `end` on.
template <int ITEMS, int THREADS, int ROWS, int COLUMNS, typename T, typename Pointer>
METAL_FUNC void read_share(
    thread T* items, Pointer from, uint index, uint row, uint end, uint stride, uint columns) {
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    const uint column = column_of_item<THREADS, COLUMNS>(index, i);
    const uint at = row + row_of_item<THREADS, COLUMNS>(index, i);
    const bool there = is_among<THREADS, ROWS * COLUMNS>(index, i) && at < end && column < columns;
    items[i] = there ? T(from[at * stride + column]) : T(0.0f);
  }
}

// Puts it into threadgroup memory, in f32.
template <int ITEMS, int THREADS, int COUNT, typename T>
METAL_FUNC void place_share(threadgroup float* to, thread const T* items, uint index) {
  UNROLL
  for (int i = 0; i < ITEMS; i++) {
    if (is_among<THREADS, COUNT>(index, i)) to[index + i * THREADS] = float(items[i]);
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

// A lane's states of one channel out of [..., N] in memory, the n-th from `first` ^ n; zeros beyond N or where there is no
// such channel.
template <int STATES, typename Pointer>
METAL_FUNC void load_states(thread float* states, Pointer row, uint first, uint size, bool there) {
  UNROLL
  for (int n = 0; n < STATES; n++) {
    const uint at = first ^ n;
    states[n] = 0.0f;
    if (there && at < size) states[n] = row[at];
  }
}

template <int STATES>
METAL_FUNC void store_states(
    device float* row, thread const float* states, uint first, uint size, bool there) {
  UNROLL
  for (int n = 0; n < STATES; n++) {
    const uint at = first ^ n;
    if (there && at < size) row[at] = states[n];
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

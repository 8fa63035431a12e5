// Arrays [O, L, I] scanned along L, where neighbouring lanes take neighbouring channels of I: a group takes 32 · WIDTH
// channels of one piece of L, and each of its simdgroups STEPS steps of a tile.

#ifdef METAL_CUDA
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  typedef ushort type;
};
template <>
struct Word<4> {
  typedef uint type;
};
template <>
struct Word<8> {
  typedef uint2 type;
};
template <>
struct Word<16> {
  typedef uint4 type;
};
#endif

// Neighbouring channels of one step, as they lie in memory.
template <typename T, int WIDTH>
struct Pack {
#ifdef METAL_CUDA
  typename Word<WIDTH * sizeof(T)>::type bits;

  METAL_FUNC float at(int i) const {
    T values[WIDTH];
    memcpy(values, &bits, sizeof(bits));
    return float(values[i]);
  }
#else
  T values[WIDTH];

  METAL_FUNC float at(int i) const { return float(values[i]); }
#endif
};

// Keeps a compiler from holding the numbers of a pack, which take more registers than it does, from before to after.
template <typename T, int WIDTH>
METAL_FUNC void hold_packed(thread Pack<T, WIDTH>& pack) {
#ifdef METAL_CUDA
  if (sizeof(T) < 4) metal::forget(pack.bits);
#endif
}

// Whether packs from here on, each of which follows another, can be loaded and stored at once.
template <typename T, int WIDTH, typename Pointer>
METAL_FUNC bool in_packs(Pointer at) {
#ifdef METAL_CUDA
  return is_aligned<WIDTH * sizeof(T)>(at);
#else
  return true;
#endif
}

template <typename T, int WIDTH>
METAL_FUNC Pack<T, WIDTH> pack_of(thread const T* values) {
  Pack<T, WIDTH> pack;
#ifdef METAL_CUDA
  memcpy(&pack.bits, values, sizeof(pack.bits));
#else
  UNROLL
  for (int i = 0; i < WIDTH; i++) pack.values[i] = values[i];
#endif
  return pack;
}

template <typename T, int WIDTH>
METAL_FUNC Pack<T, WIDTH> no_pack() {
  T values[WIDTH];
  UNROLL
  for (int i = 0; i < WIDTH; i++) values[i] = T(0.0f);
  return pack_of<T, WIDTH>(values);
}

// The channels at `at`, `step` from each other; by one load where they are `whole`.
template <typename T, int WIDTH, typename Pointer>
METAL_FUNC Pack<T, WIDTH> load_pack(Pointer at, long step, bool whole) {
#ifdef METAL_CUDA
  if (whole) {
    Pack<T, WIDTH> pack;
    pack.bits = *reinterpret_cast<const typename Word<WIDTH * sizeof(T)>::type*>(at);
    return pack;
  }
#endif
  T values[WIDTH];
  UNROLL
  for (int i = 0; i < WIDTH; i++) values[i] = at[i * step];
  return pack_of<T, WIDTH>(values);
}

template <typename T, int WIDTH>
METAL_FUNC void store_pack(device T* at, thread const T* values, bool whole) {
#ifdef METAL_CUDA
  if (whole) {
    *reinterpret_cast<typename Word<WIDTH * sizeof(T)>::type*>(at) = pack_of<T, WIDTH>(values).bits;
    return;
  }
#endif
  UNROLL
  for (int i = 0; i < WIDTH; i++) at[i] = values[i];
}

// What a thread works on: its first channel, and whether there is one; the row and the piece of its group.
struct Column {
  uint channel;
  uint piece;
  uint row;
  bool real;
};

template <int WIDTH>
METAL_FUNC Column column_of(uint group, uint lane, uint channels, uint pieces) {
  const uint tiles = (channels + 32 * WIDTH - 1) / (32 * WIDTH);
  Column column;
  column.channel = (group % tiles * 32 + lane) * WIDTH;
  column.piece = group / tiles % pieces;
  column.row = group / tiles / pieces;
  // WIDTH divides the number of channels.
  column.real = column.channel < channels;
  return column;
}

// Loads the packs of steps `first` and after; those beyond the end of the stretch keep zeros.
template <typename T, int WIDTH, int STEPS, typename Pointer>
METAL_FUNC void load_steps(
    thread Pack<T, WIDTH>* packs,
    Pointer base,
    long time_step,
    long channel_step,
    bool whole,
    Stretch stretch,
    uint first,
    bool real) {
  const long jump = stretch.by * time_step;
  long at = stretch.first * time_step + long(first) * jump;
  UNROLL
  for (int r = 0; r < STEPS; r++) {
    packs[r] = real && first + r < stretch.count ? load_pack<T, WIDTH>(base + at, channel_step, whole) : no_pack<T, WIDTH>();
    at += jump;
  }
}

// Tells the group what this simdgroup's steps do, and takes from it what happens before them: `before` becomes the state
// before this simdgroup's steps, and `carry` that after all of the tile's. `shared` holds 2 · SIMDS · 32 · WIDTH numbers; it is
// free again when the group has passed the barrier of another call with other memory.
template <int RULE, int SIMDS, int WIDTH>
METAL_FUNC void tell(thread const Step* own, threadgroup float* shared, uint simdgroup, uint lane) {
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    const uint at = (simdgroup * WIDTH + i) * 32 + lane;
    if (RULE == 0) shared[SIMDS * WIDTH * 32 + at] = own[i].decay;
    shared[at] = own[i].value;
  }
}
template <int RULE, int SIMDS, int WIDTH>
METAL_FUNC void hear(
    thread float* before, thread float* carry, threadgroup const float* shared, uint simdgroup, uint lane) {
  UNROLL
  for (int i = 0; i < WIDTH; i++) {
    float state = carry[i];
    UNROLL
    for (int s = 0; s < SIMDS; s++) {
      if (uint(s) == simdgroup) before[i] = state;
      const uint at = (s * WIDTH + i) * 32 + lane;
      const float decay = RULE == 0 ? shared[SIMDS * WIDTH * 32 + at] : 1.0f;
      state = pass<RULE>(state, step_of(decay, shared[at]));
    }
    carry[i] = state;
  }
}

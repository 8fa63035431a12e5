// Arrays [O, L] scanned along L, where neighbouring lanes take neighbouring runs of SIZE elements, on the grid of 16 bytes
// that the row begins with.

// What a team of simdgroups scans: runs `first` to `first + count` of a row, of which elements `begin` to `end` count.
struct Runs {
  uint first;
  uint count;
  uint begin;
  uint end;
};

template <int SIZE>
METAL_FUNC Runs runs_of(int begin, int end) {
  Runs runs;
  runs.begin = uint(begin);
  runs.end = uint(end);
  runs.first = runs.begin / SIZE;
  runs.count = end > begin ? (runs.end - 1) / SIZE - runs.first + 1 : 0;
  return runs;
}

// The first element of the run that comes as number `turn`.
template <bool REVERSE, int SIZE>
METAL_FUNC uint element_of(Runs runs, uint turn) {
  return (REVERSE ? runs.first + runs.count - 1 - turn : runs.first + turn) * SIZE;
}

// The elements of a run in the order of the scan; `beyond` for those that do not count.
template <bool REVERSE, typename E, int SIZE, typename Pointer>
METAL_FUNC void load_run(thread float* values, Pointer row, long step, uint length, Runs runs, uint turn, float beyond) {
  const bool real = turn < runs.count;
  const uint first = real ? element_of<REVERSE, SIZE>(runs, turn) : 0;
  float found[SIZE];
  if (step == 1) {
    read_floats<E, SIZE>(row, real ? first : length, length, found);
  } else {
    UNROLL
    for (int i = 0; i < SIZE; i++) {
      found[i] = 0.0f;
      if (real && first + i < length) found[i] = float(row[long(first + i) * step]);
    }
  }
  UNROLL
  for (int j = 0; j < SIZE; j++) {
    const int i = REVERSE ? SIZE - 1 - j : j;
    const bool counts = real && first + i >= runs.begin && first + i < runs.end;
    values[j] = counts ? found[i] : beyond;
  }
}

// Writes the elements of a run that count.
template <bool REVERSE, typename E, int SIZE>
METAL_FUNC void store_run(device E* row, thread const float* values, Runs runs, uint turn) {
  if (turn >= runs.count) return;
  const uint first = element_of<REVERSE, SIZE>(runs, turn);
  E results[SIZE];
  UNROLL
  for (int i = 0; i < SIZE; i++) results[i] = E(values[REVERSE ? SIZE - 1 - i : i]);
  if (first >= runs.begin && first + SIZE <= runs.end) {
#ifdef METAL_CUDA
    constexpr int BYTES = SIZE * sizeof(E) < 16 ? SIZE * sizeof(E) : 16;
    if (is_aligned<BYTES>(row + first)) {
      if (BYTES == 8) {
        uint2 raw;
        memcpy(&raw, results, 8);
        *reinterpret_cast<uint2*>(row + first) = raw;
      } else {
        UNROLL
        for (int part = 0; part < SIZE * int(sizeof(E)) / 16; part++) {
          uint4 raw;
          memcpy(&raw, reinterpret_cast<const char*>(results) + 16 * part, 16);
          reinterpret_cast<uint4*>(row + first)[part] = raw;
        }
      }
      return;
    }
#endif
    UNROLL
    for (int i = 0; i < SIZE; i++) row[first + i] = results[i];
    return;
  }
  UNROLL
  for (int i = 0; i < SIZE; i++) {
    if (first + i >= runs.begin && first + i < runs.end) row[first + i] = results[i];
  }
}

// What all lanes do up to and with each.
template <int RULE>
METAL_FUNC Step over_lanes(Step own, uint lane) {
  for (uint delta = 1; delta < 32; delta *= 2) {
    const Step before = step_of(
        RULE == 0 ? simd_shuffle_up(own.decay, ushort(delta)) : 1.0f, simd_shuffle_up(own.value, ushort(delta)));
    if (lane >= delta) own = joined<RULE>(before, own);
  }
  return own;
}

// For each of CHUNKS stretches of SIMDS · 32 runs, given what this lane's run does: the state before the run. `carry` becomes
// the state after all of them. `shared` holds 2 · CHUNKS · SIMDS numbers, and is free again when the group has passed the
// barrier of another call with other memory.
template <int RULE, int SIMDS, int CHUNKS>
METAL_FUNC void tell_runs(thread Step* lanes, threadgroup float* shared, uint simdgroup, uint lane) {
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    lanes[c] = over_lanes<RULE>(lanes[c], lane);
    if (SIMDS > 1 && lane == 31) {
      shared[2 * (c * SIMDS + simdgroup)] = lanes[c].decay;
      shared[2 * (c * SIMDS + simdgroup) + 1] = lanes[c].value;
    }
  }
}
template <int RULE, int SIMDS, int CHUNKS>
METAL_FUNC void hear_runs(
    thread float* before,
    thread float& carry,
    thread const Step* lanes,
    threadgroup const float* shared,
    uint simdgroup,
    uint lane) {
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    float own = carry;
    UNROLL
    for (int s = 0; s < SIMDS; s++) {
      if (uint(s) == simdgroup || SIMDS == 1) own = carry;
      Step total;
      if (SIMDS > 1) {
        total = step_of(shared[2 * (c * SIMDS + s)], shared[2 * (c * SIMDS + s) + 1]);
      } else {
        total = step_of(simd_broadcast(lanes[c].decay, ushort(31)), simd_broadcast(lanes[c].value, ushort(31)));
      }
      carry = pass<RULE>(carry, total);
    }
    const Step earlier = step_of(
        RULE == 0 ? simd_shuffle_up(lanes[c].decay, ushort(1)) : 1.0f, simd_shuffle_up(lanes[c].value, ushort(1)));
    before[c] = lane == 0 ? own : pass<RULE>(own, earlier);
  }
}

// Heads of queries or keys, shared out over threads. Stands on chunk.metal.
//
// Whichever order the axes of an array have, it is seen as [outer, heads, inner, size]: inner is 1 where the heads of a
// token lie together, and the length of the sequence where the tokens of a head do. Either way token number
// outer * inners + inner counts batch by batch.
//
// A unit is up to HEADS heads of one token, so that what is computed for the token serves all of them. LANES threads work
// on it: a head is cut into slots of two chunks, of which each thread takes every LANES-th.

struct Extent {
  uint outer;
  uint heads;
  uint inner;
  uint size;
};

template <typename Shape>
METAL_FUNC Extent extent_of(Shape shape) {
  Extent all;
  all.outer = shape[0];
  all.heads = shape[1];
  all.inner = shape[2];
  all.size = shape[3];
  return all;
}

struct Unit {
  uint token;
  uint heads;   // 0 beyond the last unit
  size_t first;  // where its first head begins
  size_t step;   // from there to the next
};

// What a unit has, but for the last of a token.
template <int HEADS>
METAL_FUNC uint most_heads(Extent all) {
  return metal::min(uint(HEADS), all.heads);
}

template <int HEADS>
METAL_FUNC uint units_of(Extent all) {
  return all.outer * all.inner * ((all.heads + HEADS - 1) / HEADS);
}

// Beyond the last unit, one without heads of token 0.
template <int HEADS>
METAL_FUNC Unit unit_of(Extent all, uint index) {
  const bool exists = index < units_of<HEADS>(all);
  if (!exists) index = 0;
  const uint sets = (all.heads + HEADS - 1) / HEADS;
  const uint inner = index % all.inner;
  const uint head = index / all.inner % sets * HEADS;
  const uint outer = index / all.inner / sets;
  Unit unit;
  unit.token = outer * all.inner + inner;
  unit.heads = exists ? metal::min(uint(HEADS), all.heads - head) : 0;
  unit.first = ((size_t(outer) * all.heads + head) * all.inner + inner) * all.size;
  unit.step = size_t(all.inner) * all.size;
  return unit;
}

// The groups that work on queries come first; those that are left work on keys.
template <int HEADS>
METAL_FUNC uint groups_of(Extent all, uint units_of_group) {
  return (units_of<HEADS>(all) + units_of_group - 1) / units_of_group;
}

// ---- slots

// The slots before this one hold what turns, those from it on what passes through.
template <typename T, int DIMS>
METAL_FUNC uint turning_slots() {
  return (DIMS / 2 + Chunk<T>::SIZE - 1) / Chunk<T>::SIZE;
}

template <typename T, int DIMS>
METAL_FUNC uint slots_of(uint size) {
  return turning_slots<T, DIMS>() + (size - DIMS + 2 * Chunk<T>::SIZE - 1) / (2 * Chunk<T>::SIZE);
}

// Where the two chunks of a slot begin and end in a head.
struct Spans {
  uint first[2];
  uint end[2];
};

// Both chunks of a slot hold halves of the same pairs; where pairs are INTERLEAVED, the one goes on where the other ends.
template <typename T, int DIMS, bool INTERLEAVED>
METAL_FUNC Spans spans_of(uint slot, uint size) {
  const uint turning = turning_slots<T, DIMS>();
  const bool turns = slot < turning;
  Spans spans;
  UNROLL
  for (uint part = 0; part < 2; part++) {
    const uint neighbours = (2 * (turns ? slot : slot - turning) + part) * Chunk<T>::SIZE;
    if (!turns) {
      spans.first[part] = DIMS + neighbours;
      spans.end[part] = size;
    } else if (INTERLEAVED) {
      spans.first[part] = neighbours;
      spans.end[part] = DIMS;
    } else {
      spans.first[part] = part * (DIMS / 2) + slot * Chunk<T>::SIZE;
      spans.end[part] = (part + 1) * (DIMS / 2);
    }
  }
  return spans;
}

// Whether every chunk of every slot is full. Then, and if the arrays begin at a multiple of 16 bytes, chunks are loaded and
// stored WHOLE, without a thought for each.
template <typename T, int DIMS>
METAL_FUNC bool has_whole_slots(uint size) {
  return DIMS / 2 % Chunk<T>::SIZE == 0 && (size - DIMS) % (2 * Chunk<T>::SIZE) == 0;
}

// What a thread holds of a head: as it is stored, and to compute with.
template <typename T>
struct Share {
  Chunk<T> parts[2];
};

template <typename T>
struct Values {
  float at[2 * Chunk<T>::SIZE];
};

// Zeros beyond the end.
template <typename T, bool WHOLE, typename Pointer>
METAL_FUNC Share<T> read_share(Pointer head, Spans spans) {
  Share<T> share;
  UNROLL
  for (int part = 0; part < 2; part++) {
    const uint first = spans.first[part];
    if (!WHOLE) {
      share.parts[part] = read_chunk<T>(head, first, spans.end[part]);
    } else if (first < spans.end[part]) {
      share.parts[part] = load_chunk<T>(head + first);
    } else {
      share.parts[part] = {};
    }
  }
  return share;
}

template <typename T, bool WHOLE>
METAL_FUNC void write_share(device T* head, Spans spans, Share<T> share) {
  UNROLL
  for (int part = 0; part < 2; part++) {
    const uint first = spans.first[part];
    if (!WHOLE) {
      write_chunk<T>(head, first, spans.end[part], share.parts[part]);
    } else if (first < spans.end[part]) {
      store_chunk<T>(head + first, share.parts[part]);
    }
  }
}

template <typename T>
METAL_FUNC Values<T> values_of(Share<T> share) {
  Values<T> values;
  UNROLL
  for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
    values.at[i] = float(share.parts[i / Chunk<T>::SIZE].values[i % Chunk<T>::SIZE]);
  }
  return values;
}

template <typename T>
METAL_FUNC Share<T> share_of(Values<T> values) {
  Share<T> share;
  UNROLL
  for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
    share.parts[i / Chunk<T>::SIZE].values[i % Chunk<T>::SIZE] = T(values.at[i]);
  }
  return share;
}

// ---- rotation

// The cosines and sines of the pairs of one slot, times a magnitude.
template <typename T>
struct Turn {
  float cos[Chunk<T>::SIZE];
  float sin[Chunk<T>::SIZE];
};

// `starts` holds where each sequence of `steps` tokens begins.
template <typename Starts>
METAL_FUNC int64_t position_of(uint token, uint steps, Starts starts) {
  return int64_t(starts[token / steps]) + int64_t(token % steps);
}

// `turns` holds what each of the pairs turns by at each position, in units of 2^-64 turns, so that an integer product that
// wraps around drops whole turns and nothing else: the angle is as good at position 10^6 as at 1.
template <typename T, typename Turns>
METAL_FUNC Turn<T> turn_of(uint slot, uint pairs, int64_t position, Turns turns, float magnitude) {
  Turn<T> turn;
  UNROLL
  for (int i = 0; i < Chunk<T>::SIZE; i++) {
    const uint pair = metal::min(slot * Chunk<T>::SIZE + i, pairs - 1);
    const uint64_t angle = uint64_t(position) * turns[pair];
    const float half_turns = float(as_type<int>(uint(angle >> 32))) * 4.656612873077393e-10f;  // 2^-31
    // What fast functions lack, half precision cannot hold.
    if (sizeof(T) == 2) {
      turn.cos[i] = magnitude * metal::fast::cos(M_PI_F * half_turns);
      turn.sin[i] = magnitude * metal::fast::sin(M_PI_F * half_turns);
    } else {
      turn.cos[i] = magnitude * metal::cospi(half_turns);
      turn.sin[i] = magnitude * metal::sinpi(half_turns);
    }
  }
  return turn;
}

template <bool INTERLEAVED, typename T>
METAL_FUNC Values<T> turned(Values<T> values, Turn<T> turn) {
  UNROLL
  for (int i = 0; i < Chunk<T>::SIZE; i++) {
    const int first = INTERLEAVED ? 2 * i : i;
    const int second = INTERLEAVED ? 2 * i + 1 : Chunk<T>::SIZE + i;
    const float a = values.at[first];
    const float b = values.at[second];
    values.at[first] = a * turn.cos[i] - b * turn.sin[i];
    values.at[second] = a * turn.sin[i] + b * turn.cos[i];
  }
  return values;
}

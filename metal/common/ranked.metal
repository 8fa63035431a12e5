// Logits as keys, whose order is that of tokens from the best on, and as weights.

// What has no key up to the last may not be drawn; the one beyond is that of infinity, and weighs nothing.
enum : uint { BINS = 1024, LISTED = 1024, SHORT_LIST = 64, LAST_KEY = 0x7f7fffffu, BEYOND = 0x7f800000u };

#define LARGEST 3.40282347e38f

// The weight of the best token is 2^42, so those of 2^20 tokens add up to less than 2^63.
METAL_FUNC float whole_weight_of(uint key) {
  return metal::fast::exp2(as_type<float>(key) * -M_LOG2E_F) * 4398046511104.0f;
}

// Below this, a weight has 32 bits.
#define HEAVY 4294967040.0f

METAL_FUNC uint64_t weight_of(uint key) {
  const float weight = whole_weight_of(key);
  // Most are light, and conversions to 64 bits slow.
  return weight < HEAVY ? uint64_t(uint(weight)) : uint64_t(weight);
}

// The sum for keys of which `nearest` is the smallest.
template <int SIZE>
METAL_FUNC uint64_t sum_of_weights(thread const uint (&keys)[SIZE], uint nearest) {
  uint64_t sum = 0;
  if (whole_weight_of(nearest) < HEAVY) {
    UNROLL
    for (int i = 0; i < SIZE; i++) sum += uint(whole_weight_of(keys[i]));
  } else {
    UNROLL
    for (int i = 0; i < SIZE; i++) sum += uint64_t(whole_weight_of(keys[i]));
  }
  return sum;
}

// A logit as a number to subtract: neither NaN nor positive infinity is one.
METAL_FUNC float real_of(float x) { return metal::min(metal::max(x, -INFINITY), LARGEST); }

// The place of an element in the order: one before another has a smaller key, or as small a one and a smaller index.
struct Rank {
  uint key;
  uint index;

  METAL_FUNC bool before(Rank other) const {
    // Without a branch, of which there would be one for each element.
    return (key < other.key) | ((key == other.key) & (index < other.index));
  }
};

METAL_FUNC Rank rank_of(uint key, uint index) {
  Rank rank;
  rank.key = key;
  rank.index = index;
  return rank;
}

// What an element becomes: the bits of d, which order as it does.
struct Scored {
  float best;
  float rate;

  METAL_FUNC uint key(float x) const {
    return as_type<uint>((best - real_of(x)) * rate);
  }
};

// Some elements of a row, in no order.
struct List {
  threadgroup uint* keys;
  threadgroup uint* indices;
  threadgroup atomic_uint* count;

  METAL_FUNC Rank rank(uint i) const { return rank_of(keys[i], indices[i]); }

  METAL_FUNC uint length() const { return atomic_load_explicit(count, memory_order_relaxed); }

  // The count goes on beyond what there is room for.
  METAL_FUNC void add(Rank rank, uint most) {
    const uint place = atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
    if (place >= most) return;
    keys[place] = rank.key;
    indices[place] = rank.index;
  }
};

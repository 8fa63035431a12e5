// Numbers as they lie in memory: what a lane loads of a row, by one load or a few, of any type of numbers.

template <int BYTES>
struct Bits {
  typedef ushort type;
};
template <>
struct Bits<1> {
  typedef uchar type;
};
template <>
struct Bits<4> {
  typedef uint type;
};

template <typename E>
METAL_FUNC uint bits_of(E value) {
  return uint(as_type<typename Bits<sizeof(E)>::type>(value));
}

// COUNT numbers of a row, as many bytes as one load or a few take.
template <typename E, int COUNT>
struct Part {
  enum : int { WORDS = COUNT * sizeof(E) < 4 ? 1 : COUNT * sizeof(E) / 4, BYTES = sizeof(E) };
  uint words[WORDS];

  METAL_FUNC void clear() {
    UNROLL
    for (int w = 0; w < WORDS; w++) words[w] = 0;
  }
  METAL_FUNC uint bits(int i) const {
    return BYTES == 4 ? words[i] : words[i * BYTES / 4] >> (8 * (i * BYTES % 4)) & (BYTES == 2 ? 0xffffu : 0xffu);
  }
};

// Out of line where there is a choice, or what is rare would take the registers of what is not.
#ifdef METAL_CUDA
#define RARE_FUNC __device__ __noinline__
#else
#define RARE_FUNC METAL_FUNC
#endif

// COUNT numbers of a row, 4 bytes at most, zeros beyond its size.
template <typename E, int COUNT, typename Pointer>
RARE_FUNC uint word_at(Pointer row, uint first, uint size, long step) {
  uint word = 0;
  for (int i = 0; i < COUNT; i++) {
    if (first + i < size) word |= bits_of<E>(row[long(first + i) * step]) << (8 * (i * int(sizeof(E)) % 4));
  }
  return word;
}

// The numbers of a row from `first` on, zeros beyond its SIZE.
template <bool FAST, int SIZE, int COUNT, typename E, typename Pointer>
METAL_FUNC void load_part(thread Part<E, COUNT>& part, Pointer row, uint first, long step) {
  constexpr int BYTES = sizeof(E);
  if (FAST) {
    // COUNT divides SIZE here.
    if (first >= uint(SIZE)) {
      part.clear();
      return;
    }
#ifdef METAL_CUDA
    if (BYTES * COUNT % 16 == 0) {
      UNROLL
      for (int w = 0; w < BYTES * COUNT / 16; w++) {
        const uint4 raw = reinterpret_cast<const uint4*>(row + first)[w];
        memcpy(part.words + 4 * w, &raw, 16);
      }
      return;
    }
    if (BYTES * COUNT == 8) {
      const uint2 raw = *reinterpret_cast<const uint2*>(row + first);
      memcpy(part.words, &raw, 8);
      return;
    }
#endif
    part.clear();
    UNROLL
    for (int i = 0; i < COUNT; i++) part.words[i * BYTES / 4] |= bits_of(row[first + i]) << (8 * (i * BYTES % 4));
    return;
  }
  UNROLL
  for (int w = 0; w < Part<E, COUNT>::WORDS; w++) {
    constexpr int NUMBERS = COUNT * BYTES < 4 ? COUNT : 4 / BYTES;
    part.words[w] = word_at<E, NUMBERS>(row, first + w * NUMBERS, SIZE, step);
  }
}

// The value of a number stored as E: itself, a signed integer, or an e4m3 float where E is unsigned.
METAL_FUNC float value_of(uint bits, float) { return as_type<float>(bits); }
METAL_FUNC float value_of(uint bits, half) { return float(as_type<half>(ushort(bits))); }
METAL_FUNC float value_of(uint bits, bfloat) { return float(as_type<bfloat>(ushort(bits))); }
METAL_FUNC float value_of(uint bits, int8_t) { return float(int(bits << 24) >> 24); }
METAL_FUNC float value_of(uint bits, uint8_t) {
  // Exponent and fraction stand as in a half whose exponent has 8 less, also below the least normal one.
  const float size = float(as_type<half>(ushort((bits & 0x7f) << 7))) * 256.0f;
  const float whole = (bits & 0x7f) == 0x7f ? NAN : size;
  return (bits & 0x80) != 0 ? -whole : whole;
}

// Whether rows of SIZE numbers, read PART at once, may be: they follow each other, and a part starts where one load may.
template <int SIZE, int PART, typename E>
METAL_FUNC bool reads_fast(long step, long offsets, uint address) {
  const uint bytes = PART * sizeof(E) < 16 ? PART * sizeof(E) : 16;
  const uint unaligned = (uint(offsets) * uint(sizeof(E)) | address) & (bytes - 1);
  return step == 1 && SIZE % PART == 0 && unaligned == 0;
}

// The last bits of an address; what it is aligned to matters to one target alone.
template <typename Pointer>
METAL_FUNC uint address_of(Pointer at) {
#ifdef METAL_CUDA
  return uint(reinterpret_cast<unsigned long long>(at));
#else
  return 0;
#endif
}

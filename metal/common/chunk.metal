// Sixteen bytes of a row: what one thread loads or stores at once.

template <typename T>
struct alignas(16) Chunk {
  enum : int { SIZE = 16 / sizeof(T) };
  T values[SIZE];
};

#ifdef METAL_CUDA
// One load in place of several, where a row of odd length or a slice does not forbid it.
template <int BYTES>
METAL_FUNC bool is_aligned(const void* pointer) {
  return (reinterpret_cast<unsigned long long>(pointer) & (BYTES - 1)) == 0;
}
#endif

// Whether a chunk may be loaded or stored here at once.
template <typename Pointer>
METAL_FUNC bool begins_a_chunk(Pointer at) {
#ifdef METAL_CUDA
  return is_aligned<16>(at);
#else
  return true;
#endif
}

// All of the chunk here, which begins one: no branch keeps several from being in flight.
template <typename T, typename Pointer>
METAL_FUNC Chunk<T> load_chunk(Pointer at) {
  Chunk<T> chunk;
#ifdef METAL_CUDA
  const uint4 raw = *reinterpret_cast<const uint4*>(at);
  memcpy(chunk.values, &raw, 16);
#else
  for (int i = 0; i < Chunk<T>::SIZE; i++) chunk.values[i] = at[i];
#endif
  return chunk;
}

// The chunk at `first` of a row of whole ones, zeros beyond its end. What load_chunk does is spelled out here too: with a
// call of it layer_norm takes 15 % longer on an H200.
template <typename T, typename Pointer>
METAL_FUNC Chunk<T> load_chunk_within(Pointer row, uint first, uint length) {
  Chunk<T> chunk;
  for (int i = 0; i < Chunk<T>::SIZE; i++) chunk.values[i] = T(0.0f);
#ifdef METAL_CUDA
  if (first < length) {
    const uint4 raw = *reinterpret_cast<const uint4*>(row + first);
    memcpy(chunk.values, &raw, 16);
  }
#else
  if (first < length) {
    for (int i = 0; i < Chunk<T>::SIZE; i++) chunk.values[i] = row[first + i];
  }
#endif
  return chunk;
}

template <typename T, typename Pointer>
METAL_FUNC void store_chunk(Pointer at, Chunk<T> chunk) {
#ifdef METAL_CUDA
  uint4 raw;
  memcpy(&raw, chunk.values, 16);
  *reinterpret_cast<uint4*>(at) = raw;
#else
  for (int i = 0; i < Chunk<T>::SIZE; i++) at[i] = chunk.values[i];
#endif
}

// Copies a chunk to threadgroup memory; it is there once the thread has called finish_copies. Where the device can, no
// register holds it meanwhile, and the thread goes on.
template <typename T, typename Pointer>
METAL_FUNC void begin_copy(threadgroup T* to, Pointer from) {
#ifdef METAL_CUDA
  metal::begin_copy_16(to, from);
#else
  store_chunk<T>(to, load_chunk<T>(from));
#endif
}

METAL_FUNC void finish_copies() {
#ifdef METAL_CUDA
  metal::finish_copies();
#endif
}

// Whether the row is made of whole chunks, each of which can be loaded at once.
template <typename T, typename Pointer>
METAL_FUNC bool is_whole(Pointer row, uint length) {
  return begins_a_chunk(row) && length % Chunk<T>::SIZE == 0;
}

// The values at `first` and after; `beyond` beyond the end of the row. Here and below what load_chunk and store_chunk do
// is spelled out: called, they make NVIDIA's compiler take 90 registers for add_rms_norm, not 64.
template <typename T, typename Pointer>
METAL_FUNC Chunk<T> read_chunk(Pointer row, uint first, uint length, T beyond = T(0.0f)) {
  Chunk<T> chunk;
  if (first + Chunk<T>::SIZE <= length) {
#ifdef METAL_CUDA
    if (is_aligned<16>(row + first)) {
      const uint4 raw = *reinterpret_cast<const uint4*>(row + first);
      memcpy(chunk.values, &raw, 16);
      return chunk;
    }
#endif
    for (int i = 0; i < Chunk<T>::SIZE; i++) chunk.values[i] = row[first + i];
    return chunk;
  }
  for (int i = 0; i < Chunk<T>::SIZE; i++) chunk.values[i] = beyond;
  // Where the whole chunk is beyond the end, its thread must not hold up the others of its simdgroup.
  if (first < length) {
    for (int i = 0; i < Chunk<T>::SIZE; i++) {
      if (first + i < length) chunk.values[i] = row[first + i];
    }
  }
  return chunk;
}

// Writes the values at `first` and after, those beyond the end of the row left out.
template <typename T>
METAL_FUNC void write_chunk(device T* row, uint first, uint length, Chunk<T> chunk) {
  if (first + Chunk<T>::SIZE <= length) {
#ifdef METAL_CUDA
    if (is_aligned<16>(row + first)) {
      uint4 raw;
      memcpy(&raw, chunk.values, 16);
      *reinterpret_cast<uint4*>(row + first) = raw;
      return;
    }
#endif
    for (int i = 0; i < Chunk<T>::SIZE; i++) row[first + i] = chunk.values[i];
  } else if (first < length) {
    for (int i = 0; i < Chunk<T>::SIZE; i++) {
      if (first + i < length) row[first + i] = chunk.values[i];
    }
  }
}

// Writes two neighbours at once; the first is at an even place of an array.
template <typename T>
METAL_FUNC void store_pair(device T* at, T first, T second) {
#ifdef METAL_CUDA
  struct alignas(2 * sizeof(T)) Pair {
    T first;
    T second;
  };
  *reinterpret_cast<Pair*>(at) = Pair{first, second};
#else
  at[0] = first;
  at[1] = second;
#endif
}

// COUNT values of a row of W, 4 or 8, in f32: for weights, whose type need not be that of what they multiply.
template <typename W, int COUNT, typename Pointer>
METAL_FUNC void read_floats(Pointer row, uint first, uint length, thread float* values) {
  if (first + COUNT <= length) {
#ifdef METAL_CUDA
    constexpr int BYTES = COUNT * sizeof(W) < 16 ? COUNT * sizeof(W) : 16;
    if (is_aligned<BYTES>(row + first)) {
      W raw[COUNT];
      if (BYTES == 8) {
        const uint2 part = *reinterpret_cast<const uint2*>(row + first);
        memcpy(raw, &part, 8);
      } else {
        for (int part = 0; part < COUNT * int(sizeof(W)) / 16; part++) {
          const uint4 bits = reinterpret_cast<const uint4*>(row + first)[part];
          memcpy(reinterpret_cast<char*>(raw) + 16 * part, &bits, 16);
        }
      }
      for (int i = 0; i < COUNT; i++) values[i] = float(raw[i]);
      return;
    }
#endif
    for (int i = 0; i < COUNT; i++) values[i] = float(row[first + i]);
    return;
  }
  for (int i = 0; i < COUNT; i++) values[i] = 0.0f;
  if (first < length) {
    for (int i = 0; i < COUNT; i++) {
      if (first + i < length) values[i] = float(row[first + i]);
    }
  }
}

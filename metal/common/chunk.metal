// Sixteen bytes of a row: what one thread loads or stores at once.

template <typename T>
struct alignas(16) Chunk {
  static constant constexpr const int SIZE = 16 / sizeof(T);
  T values[SIZE];
};

// The values at `first` and after, zeros beyond the end of the row.
template <typename T, typename Pointer>
METAL_FUNC Chunk<T> read_chunk(Pointer row, uint first, uint length) {
  Chunk<T> chunk;
  if (first + Chunk<T>::SIZE <= length) {
#ifdef METAL_CUDA
    // One load in place of several, where a row of odd length or a slice does not forbid it.
    if ((reinterpret_cast<unsigned long long>(row + first) & 15) == 0) {
      const uint4 raw = *reinterpret_cast<const uint4*>(row + first);
      memcpy(chunk.values, &raw, 16);
      return chunk;
    }
#endif
    for (int i = 0; i < Chunk<T>::SIZE; i++) chunk.values[i] = row[first + i];
  } else {
    for (int i = 0; i < Chunk<T>::SIZE; i++) {
      chunk.values[i] = first + i < length ? T(row[first + i]) : T(0.0f);
    }
  }
  return chunk;
}

// Writes the values at `first` and after, those beyond the end of the row left out.
template <typename T>
METAL_FUNC void write_chunk(device T* row, uint first, uint length, Chunk<T> chunk) {
  if (first + Chunk<T>::SIZE <= length) {
#ifdef METAL_CUDA
    if ((reinterpret_cast<unsigned long long>(row + first) & 15) == 0) {
      uint4 raw;
      memcpy(&raw, chunk.values, 16);
      *reinterpret_cast<uint4*>(row + first) = raw;
      return;
    }
#endif
    for (int i = 0; i < Chunk<T>::SIZE; i++) row[first + i] = chunk.values[i];
  } else {
    for (int i = 0; i < Chunk<T>::SIZE; i++) {
      if (first + i < length) row[first + i] = chunk.values[i];
    }
  }
}

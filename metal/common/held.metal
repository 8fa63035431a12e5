// A row that the threads which share it hold in registers, CHUNKS chunks each.

// Where the chunk `c` of a thread begins in its row.
template <typename T, int THREADS>
METAL_FUNC uint first_of(int c, uint thread_in_row) {
  return (uint(c) * THREADS + thread_in_row) * (16 / sizeof(T));
}

// Reads a row, zeros beyond its end; all of it is asked for before any of it is used.
template <int THREADS, typename T, int CHUNKS, typename Pointer>
METAL_FUNC void read_row(
    thread Chunk<T> (&held)[CHUNKS], Pointer row, uint thread_in_row, uint length) {
  if (is_whole<T>(row, length)) {
    UNROLL
    for (int c = 0; c < CHUNKS; c++) {
      held[c] = load_chunk_within<T>(row, first_of<T, THREADS>(c, thread_in_row), length);
    }
    return;
  }
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    held[c] = read_chunk<T>(row, first_of<T, THREADS>(c, thread_in_row), length);
  }
}

template <int THREADS, typename T, int CHUNKS>
METAL_FUNC void write_row(
    device T* row, thread const Chunk<T> (&held)[CHUNKS], uint thread_in_row, uint length) {
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = first_of<T, THREADS>(c, thread_in_row);
    if (first < length) write_chunk<T>(row, first, length, held[c]);
  }
}

// What belongs to each element of a row of T: its weight, say, of W. Nothing is read where it is not PRESENT.
template <int THREADS, bool PRESENT, typename T, typename W, int N, int CHUNKS, typename Pointer>
METAL_FUNC void read_beside(
    thread float (&values)[CHUNKS][N], Pointer row, uint thread_in_row, uint length) {
  if (!PRESENT) return;
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = first_of<T, THREADS>(c, thread_in_row);
    read_floats<W, N>(row, first, length, values[c]);
  }
}

// Writes what was added up for each element of a row of T.
template <int THREADS, typename T, int CHUNKS, int N>
METAL_FUNC void write_gradient(
    device float* row, thread const float (&gradient)[CHUNKS][N], uint thread_in_row, uint length) {
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    const uint first = first_of<T, THREADS>(c, thread_in_row);
    for (int i = 0; i < N; i++) {
      if (first + i < length) row[first + i] = gradient[c][i];
    }
  }
}

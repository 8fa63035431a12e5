// Arrays of heads, and how their rows come to threadgroup memory.

// One array of heads, [B, H, S, D], or [B, S, H, D] where token-major.
struct Heads {
  int batch;
  int heads;
  int length;
  int size;
  bool token_major;

  // Where the row of a token begins.
  METAL_FUNC size_t row(int batch_index, int head, int token) const {
    const size_t before = token_major ? (size_t(batch_index) * length + token) * heads + head
                                      : (size_t(batch_index) * heads + head) * length + token;
    return before * size;
  }
};

template <bool TOKEN_MAJOR, typename Shape>
METAL_FUNC Heads heads_of(Shape shape) {
  Heads all;
  all.batch = shape[0];
  all.heads = TOKEN_MAJOR ? shape[2] : shape[1];
  all.length = TOKEN_MAJOR ? shape[1] : shape[2];
  all.size = shape[3];
  all.token_major = TOKEN_MAJOR;
  return all;
}

// Copies COUNT rows, `stride` numbers apart, to threadgroup memory: zeros beyond the end of a row, the last row beyond the
// last. WHOLE: rows are made of SIZE numbers, in chunks that can be loaded at once.
template <typename T, bool WHOLE, int COUNT, int SIZE, int STRIDE, int THREADS, typename Pointer>
METAL_FUNC void stage_chunks(
    threadgroup T* target, Pointer rows, size_t stride, int length, int size, int first, uint thread_in_group) {
  constexpr uint CHUNKS = SIZE / Chunk<T>::SIZE;
  constexpr uint ALL = COUNT * CHUNKS;
  UNROLL
  for (uint turn = 0; turn < (ALL + THREADS - 1) / THREADS; turn++) {
    const uint chunk = turn * THREADS + thread_in_group;
    if (ALL % THREADS != 0 && chunk >= ALL) break;
    const uint column = chunk % CHUNKS * Chunk<T>::SIZE;
    Pointer row = rows + metal::min(first + int(chunk / CHUNKS), length - 1) * stride;
    threadgroup T* place = target + chunk / CHUNKS * STRIDE + column;
    if (WHOLE) {
      begin_copy<T>(place, row + column);
    } else {
      store_chunk<T>(place, read_chunk<T>(row, column, size));
    }
  }
}

// Copies COUNT rows of a head, of SIZE numbers each, to threadgroup memory, where they are after finish_copies and a
// barrier.
template <typename T, int COUNT, int SIZE, int STRIDE, int THREADS, typename Pointer>
METAL_FUNC void stage_rows(
    threadgroup T* target, Pointer source, Heads all, int batch, int head, int first, bool whole, uint thread_in_group) {
  Pointer rows = source + all.row(batch, head, 0);
  const size_t stride = all.row(0, 0, 1);
  if (whole) {
    stage_chunks<T, true, COUNT, SIZE, STRIDE, THREADS>(
        target, rows, stride, all.length, all.size, first, thread_in_group);
  } else {
    stage_chunks<T, false, COUNT, SIZE, STRIDE, THREADS>(
        target, rows, stride, all.length, all.size, first, thread_in_group);
  }
}

// A plain copy, sixteen bytes a thread: what other kernels' bandwidth is compared with.
//
// x: [N] of T; y: [N] of T. Grid: a thread a chunk. Threadgroup memory: none.

// ---- body ----
const uint length = x_shape[0];
const uint first = thread_position_in_grid.x * Chunk<T>::SIZE;
if (first < length) write_chunk<T>(y, first, length, read_chunk<T>(x, first, length));

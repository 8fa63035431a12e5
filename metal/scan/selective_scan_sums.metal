// What the gradient of the selective scan leaves in parts, summed.
//
//   db, dc            = Σ_r of those of each block of channels     [T, G, N] of float
//   da, dskip, dbias  = Σ_s of those of each sequence              [D, N] and [D] of float
//
// db_parts, dc_parts: [R, T, G, N] of float; da_parts: [S, D, N] of float; dskip_parts, dbias_parts: [S, D] of float.
// Grid: groups of any size along x, a thread for each element: along y those of db, those of dc, and those of da, dskip and
// dbias one behind the other. Threadgroup memory: none.

// The sum of the values at `at` of so many parts of `size`.
template <typename Pointer>
METAL_FUNC float sum_of_parts(Pointer parts, uint count, size_t size, size_t at) {
  // As many loads as hide their latency.
  constexpr uint AT_ONCE = 8;
  float sum = 0.0f;
  for (uint first = 0; first < count; first += AT_ONCE) {
    float values[AT_ONCE];
    UNROLL
    for (uint i = 0; i < AT_ONCE; i++) values[i] = first + i < count ? parts[(first + i) * size + at] : 0.0f;
    UNROLL
    for (uint i = 0; i < AT_ONCE; i++) sum += values[i];
  }
  return sum;
}

// ---- body ----
const uint blocks = db_parts_shape[0];
const uint sequences = da_parts_shape[0];
const size_t of_block = size_t(db_parts_shape[1]) * db_parts_shape[2] * db_parts_shape[3];
const size_t channels = da_parts_shape[1];
const size_t of_sequence = channels * da_parts_shape[2];
const uint which = threadgroup_position_in_grid.y;
size_t at = thread_position_in_grid.x;
if (which == 0) {
  if (at < of_block) db[at] = sum_of_parts(db_parts, blocks, of_block, at);
} else if (which == 1) {
  if (at < of_block) dc[at] = sum_of_parts(dc_parts, blocks, of_block, at);
} else if (at < of_sequence) {
  da[at] = sum_of_parts(da_parts, sequences, of_sequence, at);
} else if (at < of_sequence + channels) {
  at -= of_sequence;
  dskip[at] = sum_of_parts(dskip_parts, sequences, channels, at);
} else if (at < of_sequence + 2 * channels) {
  at -= of_sequence + channels;
  dbias[at] = sum_of_parts(dbias_parts, sequences, channels, at);
}

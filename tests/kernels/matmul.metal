// Two matrices multiplied by tiles, twice: to test tile.metal.
//
//   visited = stored = a · b    [M, N] of T, added up in f32 and rounded once
//
// a: [M, K] of T; b: [K, N] of T; where A_TRANSPOSED or B_TRANSPOSED, the transpose of these. `visited` is written element by
// element as the lanes hold it, `stored` through threadgroup memory.
// Grid: a group of 4 simdgroups for each 32 by 32 of the result, with 16 by 16 each. Threadgroup memory: 15360 bytes
// for float, 7680 else.

// Rows of threadgroup memory are padded, so that tiles are loaded without conflicts.
constant constexpr const uint STRIDE = 40;

// 32 by 32 numbers of a matrix from (row, column) on, zeros beyond its end.
template <typename T, typename Pointer>
METAL_FUNC void stage(
    threadgroup T* target, Pointer matrix, uint rows, uint columns, uint row, uint column, uint index) {
  for (uint e = index; e < 32 * 32; e += 128) {
    const uint r = row + e / 32;
    const uint c = column + e % 32;
    target[e / 32 * STRIDE + e % 32] = r < rows && c < columns ? T(matrix[size_t(r) * columns + c]) : T(0.0f);
  }
}

// ---- body ----
THREADGROUP_ARRAY(T, lefts, [32 * STRIDE]);
THREADGROUP_ARRAY(T, rights, [32 * STRIDE]);
THREADGROUP_ARRAY(T, results, [32 * STRIDE]);
const uint rows = a_shape[A_TRANSPOSED ? 1 : 0];
const uint depth = a_shape[A_TRANSPOSED ? 0 : 1];
const uint columns = b_shape[B_TRANSPOSED ? 0 : 1];
const uint index = thread_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.y * 32;
const uint column = threadgroup_position_in_grid.x * 32;
const uint tile_row = simdgroup_index_in_threadgroup / 2 * 16;
const uint tile_column = simdgroup_index_in_threadgroup % 2 * 16;

Tile<float> sum;
sum.fill(0.0f);
for (uint first = 0; first < depth; first += 32) {
  if (A_TRANSPOSED) {
    stage<T>(lefts, a, depth, rows, first, row, index);
  } else {
    stage<T>(lefts, a, rows, depth, row, first, index);
  }
  if (B_TRANSPOSED) {
    stage<T>(rights, b, columns, depth, column, first, index);
  } else {
    stage<T>(rights, b, depth, columns, first, column, index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint k = 0; k < 32; k += 16) {
    Tile<T> left;
    RightTile<T> right;
    if (A_TRANSPOSED) {
      left.load_transposed(lefts + k * STRIDE + tile_row, STRIDE);
    } else {
      left.load(lefts + tile_row * STRIDE + k, STRIDE);
    }
    if (B_TRANSPOSED) {
      right.load_transposed(rights + tile_column * STRIDE + k, STRIDE);
    } else {
      right.load(rights + k * STRIDE + tile_column, STRIDE);
    }
    multiply_tiles(sum, left, right);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

Tile<T> rounded;
UNROLL
for (int e = 0; e < TILE_ELEMENTS; e++) {
  rounded.set(e, T(sum.value(e)));
  const TilePlace place = tile_place(e, lane);
  const uint r = row + tile_row + place.row;
  const uint c = column + tile_column + place.column;
  if (r < rows && c < columns) visited[size_t(r) * columns + c] = rounded.value(e);
}
rounded.store(results + tile_row * STRIDE + tile_column, STRIDE);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint e = index; e < 32 * 32; e += 128) {
  const uint r = row + e / 32;
  const uint c = column + e % 32;
  if (r < rows && c < columns) stored[size_t(r) * columns + c] = results[e / 32 * STRIDE + e % 32];
}

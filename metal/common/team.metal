// Products by a team of four simdgroups, each of which has 16 of 64 rows: as NVIDIA's Hopper takes them, where one
// instruction of all four reads its factors from threadgroup memory by itself, and by tiles of each simdgroup elsewhere.
//
//   stage_panels(...);  publish_copies();  threadgroup_barrier(...);  multiply_rows(...);  multiply_weights(...);
//
// Factors are half or bfloat; sums are float. All four simdgroups make every call, and all or none of them take a branch
// that has one.
//
// What is staged here lies in panels of 64 columns, each of all rows, and starts on 1024 bytes: in each, eight rows of
// eight chunks are what Hopper's instruction takes at once, and its chunks go round by the row, so that the same chunk of
// eight rows lies in different banks.
template <int ROWS>
METAL_FUNC uint panel_place(uint row, uint chunk) {
#ifdef METAL_CUDA
  const uint turned = chunk % 8 ^ row % 8;
#else
  const uint turned = chunk % 8;  // simdgroup_load takes rows that are straight
#endif
  return (chunk / 8 * ROWS + row) * 64 + turned * 8;
}

// Copies ROWS rows of a head, of up to SIZE numbers each, into panels, where they are after publish_copies and a barrier:
// zeros beyond the end of a row, the last row beyond the last. `whole`: rows are made of chunks that can be loaded at once.
template <typename T, int ROWS, int SIZE, int THREADS, typename Pointer>
METAL_FUNC void stage_panels(
    threadgroup T* panels, Pointer source, Heads all, int batch, int head, int first, bool whole, uint thread_in_group) {
  constexpr uint CHUNKS = SIZE / 8;
  constexpr uint AT_ONCE = THREADS / CHUNKS;
  Pointer rows = source + all.row(batch, head, 0);
  const uint stride = uint(all.row(0, 0, 1));
  // A thread whose rows are a multiple of eight apart steps from one to the next.
  if (AT_ONCE * CHUNKS == THREADS && AT_ONCE % 8 == 0 && ROWS % AT_ONCE == 0) {
    if (whole && all.size == SIZE && first + ROWS <= all.length) {
      const uint row = thread_in_group / CHUNKS;
      const uint chunk = thread_in_group % CHUNKS;
      Pointer from = rows + (uint(first) + row) * stride + chunk * 8;
      threadgroup T* to = panels + panel_place<ROWS>(row, chunk);
      UNROLL
      for (uint turn = 0; turn < ROWS / AT_ONCE; turn++) {
        begin_copy<T>(to + turn * AT_ONCE * 64, from);
        from += AT_ONCE * stride;
      }
      return;
    }
  }
  for (uint at = thread_in_group; at < ROWS * CHUNKS; at += THREADS) {
    const uint row = at / CHUNKS;
    const uint column = at % CHUNKS * 8;
    Pointer from = rows + uint(metal::min(first + int(row), all.length - 1)) * stride;
    threadgroup T* to = panels + panel_place<ROWS>(row, at % CHUNKS);
    if (whole && column < uint(all.size)) {
      begin_copy<T>(to, from + column);
    } else {
      store_chunk<T>(to, read_chunk<T>(from, column, all.size));
    }
  }
}

#ifdef METAL_WARPGROUPS

METAL_FUNC void publish_copies() {
  metal::finish_copies();
  metal::publish_to_products();
}

// Makes `products` those of the 64 rows at `left` and the COLUMNS rows at `right`, of SIZE numbers each; `left` lies in
// panels of ROWS rows. `place`: which of its team a simdgroup is.
template <typename T, int ROWS, int COLUMNS, int SIZE>
METAL_FUNC void multiply_rows(
    thread Tile<float> (&products)[COLUMNS / 16], const T* left, const T* right, uint) {
  const metal::Panel rows = metal::panel_at(left);
  const metal::Panel columns = metal::panel_at(right);
  metal::begin_products(products, COLUMNS / 16);
  UNROLL
  for (int d = 0; d < SIZE / 16; d++) {
    const int chunk = d % 4 * 2;
    UNROLL
    for (int n = 0; n < COLUMNS / 64; n++) {
      metal::multiply_panels(
          products + 4 * n, rows + d / 4 * ROWS * 8 + chunk, columns + (d / 4 * COLUMNS + n * 64) * 8 + chunk, d > 0, T());
    }
  }
  metal::finish_products(products, COLUMNS / 16);
}

// Adds to `sums` the products of weights and the ROWS rows at `values`, of SIZE numbers each.
template <typename T, int ROWS, int SIZE>
METAL_FUNC void multiply_weights(
    thread Tile<float> (&sums)[SIZE / 16], thread Tile<T> (&weights)[ROWS / 16], const T* values) {
  const metal::Panel rows = metal::panel_at(values);
  uint4 quarters[ROWS / 16];
  UNROLL
  for (int t = 0; t < ROWS / 16; t++) {
    memcpy(&quarters[t], weights[t].values, sizeof(uint4));
    metal::forget(quarters[t]);
  }
  metal::begin_products(sums, SIZE / 16);
  UNROLL
  for (int t = 0; t < ROWS / 16; t++) {
    UNROLL
    for (int p = 0; p < SIZE / 64; p++) {
      metal::multiply_by_panel(sums + 4 * p, quarters[t], rows + (p * ROWS + t * 16) * 8, T());
    }
  }
  metal::finish_products(sums, SIZE / 16);
}

#else

METAL_FUNC void publish_copies() { finish_copies(); }

#ifdef METAL_CUDA

// The tile at `row` and `column` of panels.
template <int ROWS, typename T>
METAL_FUNC void load_left(thread Tile<T>& tile, const T* panels, uint row, uint column) {
  const uint lane = thread_index_in_simdgroup;
  metal::load_quarters(tile.values, panels + panel_place<ROWS>(row + lane % 16, column / 8 + lane / 16));
}

template <int ROWS, typename T>
METAL_FUNC void load_right(thread RightTile<T>& tile, const T* panels, uint row, uint column) {
  const uint lane = thread_index_in_simdgroup;
  metal::load_quarters_transposed(
      tile.transpose.values, panels + panel_place<ROWS>(row + lane % 16, column / 8 + lane / 16));
}

// From the tile that is its transpose.
template <int ROWS, typename T>
METAL_FUNC void load_right_transposed(thread RightTile<T>& tile, const T* panels, uint row, uint column) {
  const uint lane = thread_index_in_simdgroup;
  metal::load_quarters(
      tile.transpose.values, panels + panel_place<ROWS>(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
}

#else

template <int ROWS, typename T>
METAL_FUNC void load_left(thread Tile<T>& tile, const threadgroup T* panels, uint row, uint column) {
  tile.load(panels + panel_place<ROWS>(row, column / 8), 64);
}

template <int ROWS, typename T>
METAL_FUNC void load_right(thread RightTile<T>& tile, const threadgroup T* panels, uint row, uint column) {
  tile.load(panels + panel_place<ROWS>(row, column / 8), 64);
}

template <int ROWS, typename T>
METAL_FUNC void load_right_transposed(thread RightTile<T>& tile, const threadgroup T* panels, uint row, uint column) {
  tile.load_transposed(panels + panel_place<ROWS>(row, column / 8), 64);
}

#endif

template <typename T, int ROWS, int COLUMNS, int SIZE>
METAL_FUNC void multiply_rows(
    thread Tile<float> (&products)[COLUMNS / 16], const threadgroup T* left, const threadgroup T* right, uint place) {
  UNROLL
  for (int t = 0; t < COLUMNS / 16; t++) products[t].fill(0.0f);
  UNROLL
  for (int d = 0; d < SIZE; d += 16) {
    Tile<T> row;
    load_left<ROWS>(row, left, 16 * place, d);
    UNROLL
    for (int t = 0; t < COLUMNS / 16; t++) {
      RightTile<T> column;
      load_right_transposed<COLUMNS>(column, right, t * 16, d);
      multiply_tiles(products[t], row, column);
    }
  }
}

template <typename T, int ROWS, int SIZE>
METAL_FUNC void multiply_weights(
    thread Tile<float> (&sums)[SIZE / 16], thread Tile<T> (&weights)[ROWS / 16], const threadgroup T* values) {
  UNROLL
  for (int t = 0; t < ROWS / 16; t++) {
    UNROLL
    for (int d = 0; d < SIZE / 16; d++) {
      RightTile<T> right;
      load_right<ROWS>(right, values, t * 16, d * 16);
      multiply_tiles(sums[d], weights[t], right);
    }
  }
}

#endif

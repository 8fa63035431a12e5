// Products of tiles of 16 by 16 numbers, which the lanes of one simdgroup hold together: as 8 by 8 simdgroup matrices
// in Metal, and as one matrix instruction takes them in CUDA. Factors are half, bfloat or float; sums are float.
//
//   sum.fill(0.0f);  left.load(a, stride);  right.load(b, stride);  multiply_tiles(sum, left, right);
//   for (int e = 0; e < TILE_ELEMENTS; e++) { ... tile_place(e, lane) ... sum.value(e) ... }
//
// Every lane of the simdgroup makes every call. What is loaded from and stored to is threadgroup memory, row after row,
// `stride` numbers apart. It starts on 16 bytes, and a row of 16-bit numbers is a multiple of 16 bytes long.

// How many numbers of a tile one lane holds. Which ones, is the same for every type.
constant constexpr const int TILE_ELEMENTS = 8;

// A lane's numbers stand in two rows, this far apart.
constant constexpr const int TILE_HALVES_APART = 8;

// Where one of them stands in its tile.
struct TilePlace {
  uint row;
  uint column;
};

#ifdef METAL_CUDA

METAL_FUNC TilePlace tile_place(int element, uint lane) {
  TilePlace place;
  place.row = lane / 4 + element / 2 % 2 * 8;
  place.column = lane % 4 * 2 + element / 4 * 8 + element % 2;
  return place;
}

// Whether an element is in the second of its lane's rows.
METAL_FUNC int tile_half(int element) { return element / 2 % 2; }

// In which of its lane's four columns it is.
METAL_FUNC int tile_column(int element) { return element / 4 * 2 + element % 2; }

// The lanes that share a row differ in these bits of their number.
constant constexpr const ushort TILE_ROW_LANES[2] = {1, 2};

// A left factor or a sum: 8 by 8 quarters one below the other, then to the right, two neighbours a lane of each.
template <typename T>
struct Tile {
  T values[TILE_ELEMENTS];

  METAL_FUNC T value(int element) const { return values[element]; }
  METAL_FUNC void set(int element, T value) { values[element] = value; }

  METAL_FUNC void fill(T value) {
    for (int e = 0; e < TILE_ELEMENTS; e++) values[e] = value;
  }

  METAL_FUNC void load(const T* source, uint stride) {
    const uint lane = thread_index_in_simdgroup;
    metal::load_quarters(values, source + lane % 16 * stride + lane / 16 * 8);
  }

  // From memory that holds the transpose.
  METAL_FUNC void load_transposed(const T* source, uint stride) {
    const uint lane = thread_index_in_simdgroup;
    const uint row = lane % 8 + lane / 16 * 8;
    metal::load_quarters_transposed(values, source + row * stride + lane / 8 % 2 * 8);
  }

  METAL_FUNC void store(T* target, uint stride) const {
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const TilePlace place = tile_place(e, thread_index_in_simdgroup);
      target[place.row * stride + place.column] = values[e];
    }
  }
};

// No instruction moves floats so.
template <>
METAL_FUNC void Tile<float>::load(const float* source, uint stride) {
  for (int e = 0; e < TILE_ELEMENTS; e++) {
    const TilePlace place = tile_place(e, thread_index_in_simdgroup);
    values[e] = source[place.row * stride + place.column];
  }
}

template <>
METAL_FUNC void Tile<float>::load_transposed(const float* source, uint stride) {
  for (int e = 0; e < TILE_ELEMENTS; e++) {
    const TilePlace place = tile_place(e, thread_index_in_simdgroup);
    values[e] = source[place.column * stride + place.row];
  }
}

// A right factor. Matrix instructions take it by columns, so a lane holds of it what a left factor's lane does of its
// transpose; quarters go by columns, so that an instruction's two lie side by side.
template <typename T>
struct RightTile {
  Tile<T> transpose;

  METAL_FUNC void load(const T* source, uint stride) {
    const uint lane = thread_index_in_simdgroup;
    metal::load_quarters_transposed(transpose.values, source + lane % 16 * stride + lane / 16 * 8);
  }

  // From memory that holds the transpose.
  METAL_FUNC void load_transposed(const T* source, uint stride) {
    const uint lane = thread_index_in_simdgroup;
    const uint row = lane % 8 + lane / 16 * 8;
    metal::load_quarters(transpose.values, source + row * stride + lane / 8 % 2 * 8);
  }
};

template <>
METAL_FUNC void RightTile<float>::load_transposed(const float* source, uint stride) {
  transpose.load(source, stride);
}

template <>
METAL_FUNC void RightTile<float>::load(const float* source, uint stride) {
  for (int e = 0; e < TILE_ELEMENTS; e++) {
    const TilePlace place = tile_place(e, thread_index_in_simdgroup);
    transpose.values[e] = source[place.column * stride + place.row];
  }
}

// Adds left · right to `sum`.
template <typename T>
METAL_FUNC void multiply_tiles(thread Tile<float>& sum, thread const Tile<T>& left, thread const RightTile<T>& right) {
  uint quarters[4];
  uint columns[4];
  memcpy(quarters, left.values, sizeof(quarters));
  memcpy(columns, right.transpose.values, sizeof(columns));
  for (int half = 0; half < 2; half++) {
    metal::multiply_add(sum.values + 4 * half, quarters, columns[2 * half], columns[2 * half + 1], T());
  }
}

// A float as a sum of two of whose fractions matrix instructions read all that matters, 10 bits each. What is infinite is all
// in the first.
struct SplitFloat {
  float high;
  float low;
  // What the other factor's lower part is multiplied by.
  float finite;

  METAL_FUNC SplitFloat() {}
  METAL_FUNC explicit SplitFloat(float x) {
    // Once, or registers would hold the parts of all tiles that do not change.
    uint bits = as_type<uint>(x);
    metal::forget(bits);
    const float again = as_type<float>(bits);
    high = metal::leading_bits(again);
    const bool bounded = metal::fabs(high) < INFINITY;
    finite = bounded ? high : 0.0f;
    low = bounded ? again - high : 0.0f;
  }
};

// Of the four products of such parts the three that matter are added up, by themselves: the instruction cuts off what it adds
// to a larger sum.
METAL_FUNC void multiply_tiles(
    thread Tile<float>& sum, thread const Tile<float>& left, thread const RightTile<float>& right) {
  float products[TILE_ELEMENTS] = {};
  UNROLL
  for (int step = 0; step < 8; step += 4) {
    // A lane holds two neighbours of a row of the left factor, and of a column of the right one. To the instruction they stand
    // four apart in both, which is the same to a sum.
    SplitFloat rows[4];
    SplitFloat columns[4];
    for (int i = 0; i < 4; i++) {
      rows[i] = SplitFloat(left.values[step + i % 2 * 2 + i / 2]);
      columns[i] = SplitFloat(right.transpose.values[step + i]);
    }
    const float high[4] = {rows[0].high, rows[1].high, rows[2].high, rows[3].high};
    const float low[4] = {rows[0].low, rows[1].low, rows[2].low, rows[3].low};
    const float finite[4] = {rows[0].finite, rows[1].finite, rows[2].finite, rows[3].finite};
    for (int half = 0; half < 2; half++) {
      float* const sums = products + 4 * half;
      const SplitFloat upper = columns[2 * half];
      const SplitFloat lower = columns[2 * half + 1];
      metal::multiply_add(sums, low, upper.finite, lower.finite);
      metal::multiply_add(sums, finite, upper.low, lower.low);
      metal::multiply_add(sums, high, upper.high, lower.high);
    }
  }
  for (int e = 0; e < TILE_ELEMENTS; e++) sum.values[e] += products[e];
}

#else

METAL_FUNC TilePlace tile_place(int element, uint lane) {
  const uint quad = lane / 4;
  TilePlace place;
  place.row = element / 4 * 8 + (quad & 4) + lane / 2 % 4;
  place.column = element / 2 % 2 * 8 + (quad & 2) * 2 + lane % 2 * 2 + element % 2;
  return place;
}

METAL_FUNC int tile_half(int element) { return element / 4; }

METAL_FUNC int tile_column(int element) { return element % 4; }

constant constexpr const ushort TILE_ROW_LANES[2] = {1, 8};

// A left factor or a sum.
template <typename T>
struct Tile {
  simdgroup_matrix<T, 8, 8> quarters[2][2];

  METAL_FUNC T value(int element) {
    return quarters[element / 4][element / 2 % 2].thread_elements()[element % 2];
  }
  METAL_FUNC void set(int element, T value) {
    quarters[element / 4][element / 2 % 2].thread_elements()[element % 2] = value;
  }

  METAL_FUNC void fill(T value) {
    for (int i = 0; i < 4; i++) {
      quarters[i / 2][i % 2] = make_filled_simdgroup_matrix<T, 8, 8>(value);
    }
  }

  METAL_FUNC void load(const threadgroup T* source, uint stride) {
    for (int i = 0; i < 4; i++) {
      simdgroup_load(quarters[i / 2][i % 2], source + i / 2 * 8 * stride + i % 2 * 8, stride);
    }
  }

  // From memory that holds the transpose.
  METAL_FUNC void load_transposed(const threadgroup T* source, uint stride) {
    for (int i = 0; i < 4; i++) {
      const threadgroup T* quarter = source + i % 2 * 8 * stride + i / 2 * 8;
      simdgroup_load(quarters[i / 2][i % 2], quarter, stride, ulong2(0, 0), true);
    }
  }

  METAL_FUNC void store(threadgroup T* target, uint stride) {
    for (int i = 0; i < 4; i++) {
      simdgroup_store(quarters[i / 2][i % 2], target + i / 2 * 8 * stride + i % 2 * 8, stride);
    }
  }
};

// A right factor.
template <typename T>
struct RightTile {
  simdgroup_matrix<T, 8, 8> quarters[2][2];

  METAL_FUNC void load(const threadgroup T* source, uint stride) {
    for (int i = 0; i < 4; i++) {
      simdgroup_load(quarters[i / 2][i % 2], source + i / 2 * 8 * stride + i % 2 * 8, stride);
    }
  }

  // From memory that holds the transpose.
  METAL_FUNC void load_transposed(const threadgroup T* source, uint stride) {
    for (int i = 0; i < 4; i++) {
      const threadgroup T* quarter = source + i % 2 * 8 * stride + i / 2 * 8;
      simdgroup_load(quarters[i / 2][i % 2], quarter, stride, ulong2(0, 0), true);
    }
  }
};

// Adds left · right to `sum`.
template <typename T>
METAL_FUNC void multiply_tiles(thread Tile<float>& sum, thread Tile<T>& left, thread RightTile<T>& right) {
  UNROLL
  for (int i = 0; i < 8; i++) {
    const int row = i / 4;
    const int column = i / 2 % 2;
    simdgroup_multiply_accumulate(
        sum.quarters[row][column],
        left.quarters[row][i % 2],
        right.quarters[i % 2][column],
        sum.quarters[row][column]);
  }
}

#endif

// Over the lanes that share a row, in each of them.
METAL_FUNC float tile_row_max(float value) {
  value = metal::max(value, simd_shuffle_xor(value, TILE_ROW_LANES[0]));
  return metal::max(value, simd_shuffle_xor(value, TILE_ROW_LANES[1]));
}

METAL_FUNC float tile_row_sum(float value) {
  value += simd_shuffle_xor(value, TILE_ROW_LANES[0]);
  return value + simd_shuffle_xor(value, TILE_ROW_LANES[1]);
}

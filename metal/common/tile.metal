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

// The matrix instructions would round floats to 10 bits: here lanes ask each other for what they lack.
METAL_FUNC void multiply_tiles(
    thread Tile<float>& sum, thread const Tile<float>& left, thread const RightTile<float>& right) {
  const uint lane = thread_index_in_simdgroup;
  UNROLL
  for (int k = 0; k < 16; k++) {
    const int held = k / 8 * 4 + k % 2;
    const uint owner = k % 8 / 2;
    for (int lower = 0; lower < 2; lower++) {
      const float a = simd_shuffle(left.values[held + 2 * lower], lane / 4 * 4 + owner);
      for (int element = 0; element < 4; element++) {
        const int right_half = element / 2;
        const uint holder = (lane % 4 * 2 + element % 2) * 4 + owner;
        const float b = simd_shuffle(right.transpose.values[held + 2 * right_half], holder);
        sum.values[4 * right_half + 2 * lower + element % 2] += a * b;
      }
    }
  }
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

// Root-mean-square normalization and a linear layer in one pass over the layer's weight, for one row.
//
//   y[o] = r · Σ x[i] · w[i] · weight[o, i] + bias[o],  r = 1 / sqrt(mean(x²) + EPS)    [O] of T
//
// x: [I] of T; norm_weight: [I] of N, w = norm_weight, or 1 + norm_weight where UNIT_OFFSET;
// weight: [O, I] of T; bias: [O] of B, and never read unless BIASED. EPS: bits of a float. All is f32 and rounded once.
// One r serves the whole row, so it waits until the sums are there: each simdgroup adds up the squares as it goes, and
// reads x and norm_weight, which are small, from a cache.
// Grid: ROWS outputs a simdgroup, which has DEPTH chunks of each of their rows in flight. Threadgroup memory: none.
// Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

// What one lane has added up.
template <int ROWS>
struct Sums {
  float products[ROWS];
  float squares;
};

// Adds what DEPTH chunks of each row give, `step` apart from `first` on.
template <bool WHOLE, int DEPTH, typename T, typename N, int ROWS, typename X, typename W, typename M>
METAL_FUNC void add_chunks(
    thread Sums<ROWS>& sums,
    X x,
    W norm_weight,
    float offset,
    thread const M* rows,
    uint first,
    uint step,
    uint length) {
  constexpr int SIZE = Chunk<T>::SIZE;
  Chunk<T> chunks[DEPTH][ROWS];
  UNROLL
  for (int d = 0; d < DEPTH; d++) {
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      const uint at = first + d * step;
      chunks[d][r] = WHOLE ? load_chunk<T>(rows[r] + at) : read_chunk<T>(rows[r], at, length);
    }
  }
  UNROLL
  for (int d = 0; d < DEPTH; d++) {
    float values[SIZE];
    float weights[SIZE];
    read_floats<T, SIZE>(x, first + d * step, length, values);
    read_floats<N, SIZE>(norm_weight, first + d * step, length, weights);
    UNROLL
    for (int i = 0; i < SIZE; i++) {
      sums.squares += values[i] * values[i];
      values[i] *= weights[i] + offset;
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        sums.products[r] += values[i] * float(chunks[d][r].values[i]);
      }
    }
  }
}

// ---- body ----
constexpr int SIZE = Chunk<T>::SIZE;
const uint outputs = weight_shape[0];
const uint length = weight_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup =
    threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup;
const uint output = simdgroup * ROWS;
if (output >= outputs) return;

// Where rows are missing, the last one is taken again.
decltype(weight) rows[ROWS];
Sums<ROWS> sums;
sums.squares = 0.0f;
UNROLL
for (int r = 0; r < ROWS; r++) {
  rows[r] = weight + size_t(output + r < outputs ? output + r : outputs - 1) * length;
  sums.products[r] = 0.0f;
}

const float offset = UNIT_OFFSET ? 1.0f : 0.0f;
const uint step = 32 * SIZE;
uint first = lane * SIZE;
if (is_whole<T>(weight, length)) {
  for (; first + (DEPTH - 1) * step < length; first += DEPTH * step) {
    add_chunks<true, DEPTH, T, N>(sums, x, norm_weight, offset, rows, first, step, length);
  }
  for (; first < length; first += step) {
    add_chunks<true, 1, T, N>(sums, x, norm_weight, offset, rows, first, step, length);
  }
} else {
  for (; first < length; first += step) {
    add_chunks<false, 1, T, N>(sums, x, norm_weight, offset, rows, first, step, length);
  }
}

const float scale = metal::rsqrt(simd_sum(sums.squares) / float(length) + as_type<float>(EPS));
UNROLL
for (int r = 0; r < ROWS; r++) {
  const float product = simd_sum(sums.products[r]) * scale;
  if (lane == uint(r) && output + r < outputs) {
    y[output + r] = T(product + (BIASED ? float(bias[BIASED ? output + r : 0]) : 0.0f));
  }
}

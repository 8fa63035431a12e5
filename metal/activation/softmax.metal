// Softmax over the last axis, in one pass over memory where a row fits into registers.
//
//   y = exp(s · (x - max(x))) / sum(exp(s · (x - max(x))))      [N, D] of T; zeros where all of a row is -inf
//
// x: [N, D] of T. RATE: the bits of s / ln 2 as a float: exponentials are powers of two here.
// A thread keeps CHUNKS chunks of its row in registers. Where TILED, that is one tile of several, and a row is read
// twice. Grid: a group of SIMDS simdgroups a row; with SIMDS = 1, a row a simdgroup. Threadgroup memory: 256 bytes.
// Milakov and Gimelshein, Online normalizer calculation for softmax, 2018 (arXiv:1805.02867).

// What is known of some values: the largest, and the sum of exponentials relative to it.
struct Summed {
  float peak;
  float total;
};

METAL_FUNC float exponential(float value, float base, float rate) {
  return metal::fast::exp2((value - base) * rate);
}

// The same with another peak, which is no smaller.
METAL_FUNC Summed relative_to(float peak, Summed part, float rate) {
  part.total *= exponential(part.peak, base_of(peak), rate);
  part.peak = peak;
  return part;
}

METAL_FUNC Summed over_lanes(Summed part, float rate) {
  part = relative_to(simd_max(part.peak), part, rate);
  part.total = simd_sum(part.total);
  return part;
}

// `partial` holds 64 numbers, and none is touched where SIMDS is 1.
template <int SIMDS>
METAL_FUNC Summed over_row(
    Summed part, float rate, threadgroup float* partial, uint simdgroup, uint lane) {
  part = over_lanes(part, rate);
  if (SIMDS == 1) return part;
  if (lane == 0) {
    partial[simdgroup] = part.peak;
    partial[32 + simdgroup] = part.total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  part.peak = lane < uint(SIMDS) ? partial[lane] : -INFINITY;
  part.total = lane < uint(SIMDS) ? partial[32 + lane] : 0.0f;
  return over_lanes(part, rate);
}

// ---- body ----
THREADGROUP_ARRAY(float, partial, [64]);
constexpr int SIZE = Chunk<T>::SIZE;
const uint rows = x_shape[0];
const uint length = x_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Place place = place_of<SIMDS>(
    threadgroup_position_in_grid.x, simdgroup, simdgroups_per_threadgroup, lane);
if (place.row >= rows) return;
const size_t offset = size_t(place.row) * length;
const uint own = place.thread_in_row * SIZE;
const uint step = SIMDS * 32 * SIZE;
const uint end = TILED ? length : 1;
const float rate = as_type<float>(RATE);

Chunk<T> kept[CHUNKS];
Summed summed;
summed.peak = -INFINITY;
summed.total = 0.0f;
for (uint start = 0; start < end; start += CHUNKS * step) {
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    kept[c] = read_chunk<T>(x + offset, start + c * step + own, length, T(-INFINITY));
  }
  float peak = summed.peak;
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      const float value = float(kept[c].values[i]);
      peak = value > peak ? value : peak;
    }
  }
  summed = relative_to(peak, summed, rate);
  const float base = base_of(peak);
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      summed.total += exponential(float(kept[c].values[i]), base, rate);
    }
  }
}
summed = over_row<SIMDS>(summed, rate, partial, simdgroup, lane);
const float base = base_of(summed.peak);
const float share = summed.total == 0.0f ? 0.0f : 1.0f / summed.total;

for (uint start = 0; start < end; start += CHUNKS * step) {
  if (TILED) {
    UNROLL
    for (int c = 0; c < CHUNKS; c++) {
      kept[c] = read_chunk<T>(x + offset, start + c * step + own, length);
    }
  }
  UNROLL
  for (int c = 0; c < CHUNKS; c++) {
    for (int i = 0; i < SIZE; i++) {
      kept[c].values[i] = T(exponential(float(kept[c].values[i]), base, rate) * share);
    }
    write_chunk<T>(y + offset, start + c * step + own, length, kept[c]);
  }
}

// Layer normalization.
//
//   y = (x - mean(x)) / sqrt(var(x) + EPS) · weight + bias   [N, D] of T, mean and (biased) variance in f32
//
// x: [N, D] of T; weight: [P] of W, with P = D, or not read where not WEIGHTED; bias: [Q] of B, with Q = D, or not read
// where not BIASED. EPS: bits of a float. A thread holds CHUNKS chunks of its row in registers.
// Grid: a group of SIMDS simdgroups a row; with SIMDS = 1, a row for each LANES lanes. Threadgroup memory: 128 bytes.
// Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450).

// ---- body ----
THREADGROUP_ARRAY(float, partial, [2][16]);
constexpr int THREADS = SIMDS * LANES;
const uint length = x_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const Place place = place_of<SIMDS, LANES>(
    threadgroup_position_in_grid.x, simdgroup, simdgroups_per_threadgroup, lane);
const uint thread_in_row = place.thread_in_row;
const size_t offset = size_t(place.row) * length;
// A row beyond the last is as good as empty.
const uint end = SIMDS > 1 || place.row < uint(x_shape[0]) ? length : 0;

Chunk<T> held[CHUNKS];
read_row<THREADS>(held, x + offset, thread_in_row, end);
standardize<SIMDS, LANES, WEIGHTED, BIASED, W, B>(
    y + offset, held, weight, bias, thread_in_row, length, end, as_type<float>(EPS),
    partial[0], partial[1], simdgroup, lane);

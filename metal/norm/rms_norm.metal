// Root-mean-square normalization.
//
//   y = x / sqrt(mean(x²) + EPS) · w   [N, D] of T, the mean in f32
//
// x: [N, D] of T; weight: [P] of W. w = weight, or 1 + weight where UNIT_OFFSET, with P = D; or, where not WEIGHTED, 1,
// and weight is not read. EPS: bits of a float. A thread holds CHUNKS chunks of its row in registers.
// Grid: a group of SIMDS simdgroups a row; with SIMDS = 1, a row for each LANES lanes. Threadgroup memory: 64 bytes.
// Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

// ---- body ----
THREADGROUP_ARRAY(float, partial, [16]);
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
rms_normalize<SIMDS, LANES, WEIGHTED, UNIT_OFFSET, W>(
    y + offset, held, weight, thread_in_row, length, end, as_type<float>(EPS), partial, simdgroup, lane);

// Attention of a few queries over many keys, a part of the keys to each group.
//
//   y = softmax(cap · tanh(scale · q kᵀ / cap) - slope · distance) v, lse = log(sum(exp(..)))
//
// queries: [B, H, Q, SIZE], keys: [B, K, S, SIZE], values: [B, K, S, VALUE_SIZE], all of T and read by strides; query
// head h reads head h / (H / K). Query i stands at key p = i + S - Q and sees keys from p - LEFT to p + RIGHT, each of
// which is FAR above what it says, and none where it is FAR and more. slopes: [B, H] of float, if ALIBI. sinks: [H] of
// float, logits that have no value, if SINKS.
// y: [P, B, H, Q, VALUE_SIZE] and lse: [P, B, H, Q], of each part alone; y is of T where there is one part. Rows that see
// nothing are zeros and -inf, or the sink. RATE: the bits of a float, the scale over cap or, without, over ln 2; CAP: cap over ln 2, or 0.
// Grid: for each batch row, head of keys and ROWS of its queries a group of SIMDS simdgroups; P along y. BY_TILES: products
// by tiles of TILES times 8 rows, else TILES rows. Threadgroup memory: 4 · (ROWS · VALUE_SIZE + 2 (SIMDS + 1) ROWS) bytes.
// Dao et al., Flash-Decoding for long-context inference, 2023.

// ---- body ----
constexpr int ROWS = BY_TILES ? 8 * TILES : TILES;
THREADGROUP_ARRAY(float, sums, [ROWS * VALUE_SIZE]);
THREADGROUP_ARRAY(float, peaks, [(SIMDS + 1) * ROWS]);
THREADGROUP_ARRAY(float, totals, [(SIMDS + 1) * ROWS]);
typedef typename Sweep<BY_TILES, T, T, T, SIZE, VALUE_SIZE, TILES>::type Own;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint heads = queries_shape[1];
const uint length = queries_shape[2];
const uint key_heads = keys_shape[1];

Span span;
span.heads = heads / key_heads;
span.count = span.heads * length;
const uint blocks = (span.count + ROWS - 1) / ROWS;
const uint pair = threadgroup_position_in_grid.x / blocks;
const uint b = pair / key_heads;
const uint key_head = pair % key_heads;
const uint head = key_head * span.heads;
span.first = threadgroup_position_in_grid.x % blocks * ROWS;
span.keys = keys_shape[2];
span.offset = span.keys - int(length);
const uint split = threadgroup_position_in_grid.y;
span.output = ((split * queries_shape[0] + b) * heads + head) * length;
span.head_step = length;
span.query_step = 1;

Own sweep;
prepare<LEFT, RIGHT, ALIBI>(
    sweep,
    span,
    queries + long(b) * queries_strides[0] + long(head) * queries_strides[1],
    queries_strides[1],
    queries_strides[2],
    queries_strides[3],
    slopes + (ALIBI ? b * heads + head : 0),
    lane);

Cached<decltype(keys + 0)> key_rows;
key_rows.start = keys + long(b) * keys_strides[0] + long(key_head) * keys_strides[1];
key_rows.row_step = keys_strides[2];
key_rows.step = keys_strides[3];
Cached<decltype(values + 0)> value_rows;
value_rows.start = values + long(b) * values_strides[0] + long(key_head) * values_strides[1];
value_rows.row_step = values_strides[2];
value_rows.step = values_strides[3];
const bool fast =
    reads_fast<SIZE, Own::KEY_PART, T>(key_rows.step, key_rows.row_step, address_of(key_rows.start)) &&
    reads_fast<VALUE_SIZE, Own::VALUE_PART, T>(value_rows.step, value_rows.row_step, address_of(value_rows.start));

const uint stride = SIMDS * Own::KEYS;
const Stretch keys_of_group =
    stretch_of<LEFT, RIGHT, Own::KEYS>(span, ROWS, split, threadgroups_per_grid.y, stride);
const uint first = keys_of_group.first + simdgroup * Own::KEYS;
const float rate = as_type<float>(RATE);
const float cap = as_type<float>(CAP);
if (fast) {
  sweep.template walk<true>(key_rows, value_rows, first, keys_of_group.end, stride, rate, cap, lane);
} else {
  sweep.template walk<false>(key_rows, value_rows, first, keys_of_group.end, stride, rate, cap, lane);
}

Shared shared;
shared.sums = sums;
shared.peaks = peaks;
shared.totals = totals;
finish<SIMDS, SINKS, VALUE_SIZE>(
    sweep, shared, span, sinks + (SINKS ? head : 0), results_in(y, lse), simdgroup, lane);

// Attention over keys and values that lie in blocks, of sequences of any lengths at once, a part of the keys to each group.
//
//   y = softmax(cap · tanh(scale · q kᵀ / cap) - slope · distance) v, lse = log(sum(exp(..)))
//
// queries: [N, H, SIZE] of T, by strides: those of sequence c are starts[c] to starts[c + 1] - 1; starts: [C + 1] of int, by
// strides.
// keys: [BLOCKS, BLOCK, K, SIZE] of E and values: [BLOCKS, BLOCK, K, VALUE_SIZE] of F, by strides; query head h reads
// head h / (H / K). Key j of sequence c is key j % BLOCK of block tables[c, j / BLOCK]; tables: [C, WIDTH] of int, by strides, in
// which nothing is read beyond the sequence's last block, and an entry that is no block stands for the nearest. Sequence c has
// lengths[c] keys, of which its last query's is the last; lengths: [C] of int, by strides, and none beyond WIDTH blocks is read.
// E is T, or int8_t, or uint8_t for e4m3 floats; then a number stands for itself times a scale, if KEYS_SCALED: key_scales,
// of float, are [BLOCKS, BLOCK, K], or [BLOCKS, 1, K] for one a block, by strides. F, VALUES_SCALED and value_scales likewise.
// LEFT, RIGHT, slopes: [1, H], sinks: [H], RATE, CAP, BY_TILES, TILES: as in decode.metal.
// y: [P, N, H, VALUE_SIZE] and lse: [P, N, H], of each part alone; y is of T where there is one part. After without_lse.metal
// there is no lse, and y has no P. Queries of no sequence see nothing, and have zeros and -inf, or the sink.
// Grid: along x, for each head of keys N · (H / K) / ROWS + C + 1 groups of SIMDS simdgroups: block x of rows is of the
// last sequence c for which starts[c] · (H / K) / ROWS + c <= x, and there may be none for it. P along y.
// Threadgroup memory: 4 · (ROWS · VALUE_SIZE + 2 (SIMDS + 1) ROWS) bytes.
// Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, 2023.

#ifndef LOGARITHMS
#define LOGARITHMS lse
#endif

// Where a sequence's rows lie in blocks.
template <typename Pointer, typename Table, typename Scales, int BLOCK, bool SCALED>
struct Paged {
  Pointer start;
  Table table;
  Scales scales;
  long block_step;
  long row_step;
  long step;
  long scale_block_step;
  long scale_step;
  int last_block;
  // Of the keys that were turned to, where they all lie in one block.
  Pointer block_start;

  template <int KEYS>
  METAL_FUNC void turn_to(uint first) {
    if (BLOCK % KEYS == 0) block_start = start + block(first) * block_step;
  }

  METAL_FUNC long block(uint key) const { return clamped(table[key / BLOCK], 0, last_block); }
  template <int KEYS>
  METAL_FUNC Pointer row(uint key) const {
    const Pointer at = BLOCK % KEYS == 0 ? block_start : start + block(key) * block_step;
    return at + long(key % BLOCK) * row_step;
  }
  METAL_FUNC float scale(uint key) const {
    return SCALED ? scales[SCALED ? block(key) * scale_block_step + long(key % BLOCK) * scale_step : 0] : 1.0f;
  }
};

// starts[c], where starts go up from 0 to what there is, and the one after them is that.
template <typename Starts>
METAL_FUNC int start_of(Starts starts, int sequence, int sequences, int count) {
  if (sequence == 0) return 0;
  return sequence > sequences ? count : clamped(starts[sequence], 0, count);
}

// ---- body ----
constexpr int ROWS = BY_TILES ? 8 * TILES : TILES;
THREADGROUP_ARRAY(float, sums, [ROWS * VALUE_SIZE]);
THREADGROUP_ARRAY(float, peaks, [(SIMDS + 1) * ROWS]);
THREADGROUP_ARRAY(float, totals, [(SIMDS + 1) * ROWS]);
typedef typename Sweep<BY_TILES, T, E, F, SIZE, VALUE_SIZE, TILES>::type Own;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const int count = queries_shape[0];
const int heads = queries_shape[1];
const int key_heads = keys_shape[2];
const int sequences = lengths_shape[0];
const int shared_by = heads / key_heads;
const int block = threadgroup_position_in_grid.x / key_heads;
const int key_head = threadgroup_position_in_grid.x % key_heads;
const int head = key_head * shared_by;
const uint split = threadgroup_position_in_grid.y;
const auto starting = strided(starts + 0, starts_strides[0]);

// The queries after the last sequence's are those of one more, which has no keys.
int sequence = 0;
for (int end = sequences + 1; end - sequence > 1;) {
  const int middle = (sequence + end) / 2;
  const long first = long(start_of(starting, middle, sequences, count)) * shared_by / ROWS + middle;
  if (first <= block) {
    sequence = middle;
  } else {
    end = middle;
  }
}
const int start = start_of(starting, sequence, sequences, count);
const int length = start_of(starting, sequence + 1, sequences, count) - start;

Span span;
span.heads = shared_by;
span.count = length * shared_by;
span.first = (block - int(long(start) * shared_by / ROWS) - sequence) * ROWS;
if (span.first >= span.count) return;
const bool real = sequence < sequences;
const int most = tables_shape[1] * BLOCK;
span.keys = real ? clamped(lengths[long(real ? sequence : 0) * lengths_strides[0]], 0, most) : 0;
span.offset = span.keys - length;
span.output = (split * count + start) * heads + head;
span.head_step = 1;
span.query_step = heads;

Own sweep;
prepare<LEFT, RIGHT, ALIBI>(
    sweep,
    span,
    queries + long(start) * queries_strides[0] + long(head) * queries_strides[1],
    queries_strides[1],
    queries_strides[0],
    queries_strides[2],
    slopes + (ALIBI ? head : 0),
    lane);

const auto table = strided(tables + (real ? long(sequence) * tables_strides[0] : 0), tables_strides[1]);
Paged<decltype(keys + 0), Strided<decltype(tables + 0)>, decltype(key_scales + 0), BLOCK, KEYS_SCALED> key_rows;
key_rows.start = keys + long(key_head) * keys_strides[2];
key_rows.table = table;
key_rows.scales = key_scales + (KEYS_SCALED ? long(key_head) * key_scales_strides[2] : 0);
key_rows.block_step = keys_strides[0];
key_rows.row_step = keys_strides[1];
key_rows.step = keys_strides[3];
key_rows.scale_block_step = key_scales_strides[0];
key_rows.scale_step = key_scales_shape[1] == 1 ? 0 : key_scales_strides[1];
key_rows.last_block = keys_shape[0] - 1;
key_rows.block_start = key_rows.start;
Paged<decltype(values + 0), Strided<decltype(tables + 0)>, decltype(value_scales + 0), BLOCK, VALUES_SCALED> value_rows;
value_rows.start = values + long(key_head) * values_strides[2];
value_rows.table = table;
value_rows.scales = value_scales + (VALUES_SCALED ? long(key_head) * value_scales_strides[2] : 0);
value_rows.block_step = values_strides[0];
value_rows.row_step = values_strides[1];
value_rows.step = values_strides[3];
value_rows.scale_block_step = value_scales_strides[0];
value_rows.scale_step = value_scales_shape[1] == 1 ? 0 : value_scales_strides[1];
value_rows.last_block = key_rows.last_block;
value_rows.block_start = value_rows.start;
const bool fast =
    reads_fast<SIZE, Own::KEY_PART, E>(
        key_rows.step, key_rows.row_step | key_rows.block_step, address_of(key_rows.start)) &&
    reads_fast<VALUE_SIZE, Own::VALUE_PART, F>(
        value_rows.step, value_rows.row_step | value_rows.block_step, address_of(value_rows.start));

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
    sweep, shared, span, sinks + (SINKS ? head : 0), results_in(y, LOGARITHMS), simdgroup, lane);

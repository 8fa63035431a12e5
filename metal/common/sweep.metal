// What a group of simdgroups does with sweeps over keys, of one kind or the other: gives each its rows, and adds up what
// they found.

// One of the two.
template <bool BY_TILES, typename T, typename E, typename F, int SIZE, int VALUE_SIZE, int TILES>
struct Sweep {
  typedef TileSweep<T, E, F, SIZE, VALUE_SIZE, TILES> type;
};
template <typename T, typename E, typename F, int SIZE, int VALUE_SIZE, int TILES>
struct Sweep<false, T, E, F, SIZE, VALUE_SIZE, TILES> {
  typedef LaneSweep<T, E, F, SIZE, VALUE_SIZE, TILES> type;
};

// Gives a sweep its rows. `queries` begins with query 0 of the group's first head, and `slopes` with that head.
template <int LEFT, int RIGHT, bool ALIBI, typename S, typename Pointer, typename Slopes>
METAL_FUNC void prepare(
    thread S& sweep, Span span, Pointer queries, long head_step, long query_step, long step, Slopes slopes, uint lane) {
  sweep.begin();
  UNROLL
  for (int n = 0; n < S::TILES_OF_ROWS; n++) {
    const int index = span.first + sweep.query_row(n, lane);
    const bool real = index < span.count;
    const int taken = real ? index : 0;
    const long offset = long(taken % span.heads) * head_step + long(taken / span.heads) * query_step;
    sweep.take_query(n, queries + offset, step, real, lane);
    UNROLL
    for (int c = 0; c < S::ROWS_OF_LANE; c++) {
      const int r = sweep.row(n, c, lane);
      sweep.rows[n][c] = row_of<LEFT, RIGHT>(span, r);
      if (ALIBI) sweep.rows[n][c].slope = float(slopes[ALIBI ? (span.first + r) % span.heads : 0]) * M_LOG2E_F;
    }
  }
}

// What the simdgroups of a group share: ROWS · VALUE_SIZE sums, and for each of SIMDS simdgroups and each row two numbers;
// at the end, two for each row.
struct Shared {
  threadgroup float* sums;
  threadgroup float* peaks;
  threadgroup float* totals;
};

// Where results go: averages of values, and the logarithm of what they were divided by, unless that is nowhere.
template <typename Out>
struct Results {
  device Out* averages;
  device float* logarithms;
};
template <typename Out>
METAL_FUNC Results<Out> results_in(device Out* averages, device float* logarithms) {
  Results<Out> results;
  results.averages = averages;
  results.logarithms = logarithms;
  return results;
}

// Adds up what the simdgroups of a group found, and writes it. `sinks` begins with the group's first head; a sink takes
// part in the sum of weights and in no average.
template <int SIMDS, bool SINKS, int VALUE_SIZE, typename S, typename Out, typename Pointer>
METAL_FUNC void finish(
    thread const S& sweep,
    Shared shared,
    Span span,
    Pointer sinks,
    Results<Out> results,
    uint simdgroup,
    uint lane) {
  constexpr int ROWS = S::ROWS;
  const uint thread_index = simdgroup * 32 + lane;
  sweep.tell(shared.peaks + simdgroup * ROWS, shared.totals + simdgroup * ROWS, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* const tops = shared.peaks + SIMDS * ROWS;
  threadgroup float* const shares = shared.totals + SIMDS * ROWS;
  if (thread_index < uint(ROWS)) {
    const int r = int(thread_index);
    const bool real = span.first + r < span.count;
    float sink = -INFINITY;
    if (SINKS && real) sink = float(sinks[SINKS ? (span.first + r) % span.heads : 0]) * M_LOG2E_F;
    float top = sink;
    for (int s = 0; s < SIMDS; s++) {
      const float peak = shared.peaks[s * ROWS + r];
      top = peak > top ? peak : top;
    }
    float total = SINKS ? power(sink, top) : 0.0f;
    for (int s = 0; s < SIMDS; s++) total += shared.totals[s * ROWS + r] * power(shared.peaks[s * ROWS + r], top);
    tops[r] = top;
    shares[r] = total == 0.0f ? 0.0f : 1.0f / total;
    if (real && results.logarithms != nullptr)
      results.logarithms[output_of(span, r)] = total == 0.0f ? -INFINITY : (top + metal::log2(total)) * M_LN2_F;
  }
  for (int s = 0; s < SIMDS; s++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == uint(s)) sweep.add(shared.sums, tops, s == 0, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < uint(ROWS * VALUE_SIZE); i += SIMDS * 32) {
    const int r = i / VALUE_SIZE;
    if (span.first + r >= span.count) break;
    results.averages[output_of(span, r) * VALUE_SIZE + i % VALUE_SIZE] = Out(shared.sums[i] * shares[r]);
  }
}

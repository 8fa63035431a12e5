// Temperature, top-k, top-p and min-p of each row of logits, and a draw from what they leave, without a sort.
//
//   d_i = (max(x) - x_i) · rate,  w_i = floor(2^42 · exp(-d_i)),  token = the first i with w_0 + … + w_i > u · Σ w
//
// x: [N, V] of T; rates: [N], the reciprocals of temperatures, 0 for the best token. Tokens are ordered by d, and of equal
// ones the lowest first. Left are the first top_k of them; of these the first whose weights, before each, add up to less
// than all but spares / 2^64; of these those of d <= floors. u comes from keys and positions. tokens, after and before:
// [N], the token, its logarithm among what is left, and among all of x untempered, where BEFORE.
//
// A filter's last token is found by a histogram of its row, of counts or of weights, and then among the few tokens of one
// bin; a bin of many is parted again. Sums are those of integers, which no order changes. The row is read once for its
// largest element, twice for each filter that is on, once where none is; each simdgroup reads a stretch of it.
// Grid: a group of SIMDS simdgroups a row. Threadgroup memory: 18 KB.
// Widynski, Squares: A Fast Counter-Based RNG, 2020 (arXiv:2004.06278).

// How far from the best a filter's last element is, at most or most likely: no bin is made of what is further.
METAL_FUNC float reach_of_seats(uint seats, float least_peak, uint peaks) {
  // As many elements as there are threads are no worse than the worst of what threads found best.
  const float reach = seats <= peaks ? least_peak * 1.0001f : 64.0f;
  return metal::min(metal::max(reach, 0.001f), 64.0f);
}

METAL_FUNC float reach_of_weights(uint length, uint64_t dropped) {
  // All that is further weighs less than what may be dropped.
  const float share = metal::max(float(dropped >> 40) / 16777216.0f, 1e-7f);
  return metal::max(metal::log(float(length) / share), 0.001f);
}

// What a group shares.
struct Shared {
  threadgroup atomic_uint* lows;
  threadgroup atomic_uint* highs;
  List list;
  List short_list;
  threadgroup uint64_t* partial;
  threadgroup uint64_t* before;
  threadgroup uint* found;
};

// One row and the group that works on it.
template <typename T, int SIMDS, typename Pointer>
struct Search {
  enum : uint { THREADS = SIMDS * 32 };

  Pointer row;
  uint length;
  Scored scored;
  Rank limit;
  uint floor;
  float reach;
  Shared shared;
  uint simdgroup;
  uint lane;
  uint thread_in_group;
  // Whether `partial` has the weights of each stretch within limit and floor.
  bool weighed;

  // The sum over the group; `partial` has that of each simdgroup.
  METAL_FUNC uint64_t sum(uint64_t value) {
    value = lanes_sum(value);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) shared.partial[simdgroup] = value;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return partial_sum(SIMDS);
  }

  METAL_FUNC uint64_t partial_sum(uint count) const {
    uint64_t total = 0;
    for (uint i = 0; i < count; i++) total += shared.partial[i];
    return total;
  }

  METAL_FUNC void clear_bins() {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint bin = thread_in_group; bin < uint(BINS); bin += THREADS) {
      atomic_store_explicit(shared.lows + bin, 0u, memory_order_relaxed);
      atomic_store_explicit(shared.highs + bin, 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // The bin in which the amounts reach `need`, and what the bins before have; BINS where none does.
  METAL_FUNC uint reached_bin(uint64_t need, thread uint64_t& before) {
    constexpr uint EACH = BINS / THREADS;
    const uint first = thread_in_group * EACH;
    uint64_t own = 0;
    for (uint i = 0; i < EACH; i++) own += read_both(shared.lows + first + i, shared.highs + first + i);
    const uint64_t all = sum(own);
    uint64_t reached = partial_sum(simdgroup) + lanes_before(own, lane);
    if (thread_in_group == 0) {
      shared.found[0] = BINS;
      shared.before[0] = all;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < EACH; i++) {
      const uint64_t amount = read_both(shared.lows + first + i, shared.highs + first + i);
      if (reached < need && reached + amount >= need) {
        shared.found[0] = first + i;
        shared.before[0] = reached;
      }
      reached += amount;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    before = shared.before[0];
    return shared.found[0];
  }

  // Makes the limit the last element before which the amounts are less than `need`: all but `dropped` / 2^64 of the
  // weights, or `seats` elements.
  METAL_FUNC void tighten(bool mass, uint64_t seats, uint64_t dropped) {
    Histogram histogram;
    histogram.scored = scored;
    histogram.mass = mass;
    histogram.limit = limit;
    histogram.low = 0;
    histogram.high = limit.key;
    histogram.bins.low = 0;
    histogram.bins.shift = 0;
    histogram.bins.scale = float(BINS) / reach;
    // A little more, for the division is rounded.
    histogram.furthest = as_type<uint>(reach * 1.001f);
    histogram.lows = shared.lows;
    histogram.highs = shared.highs;
    uint64_t need = seats;
    uint64_t before = 0;
    weighed = false;
    for (bool first = true;; first = false) {
      clear_bins();
      histogram.total = 0;
      visit<T, SIMDS>(row, length, simdgroup, lane, histogram);
      const uint64_t total = sum(histogram.total);
      if (first) {
        if (mass) need = total - share_of(dropped, total);
        if (need >= total) return;
      }
      uint64_t bins_before = 0;
      const uint bin = reached_bin(need - before, bins_before);
      before += bins_before;
      const uint low = first_key_of(histogram.bins, bin, histogram.low, histogram.high);
      histogram.high = first_key_of(histogram.bins, bin + 1, low, histogram.high) - 1;
      histogram.low = low;
      if (listed(mass, low, histogram.high, need - before)) return;
      if (low == histogram.high) {
        const uint64_t each = amount_of(mass, low);
        limit_to_equal(low, (need - before - 1) / each);
        return;
      }
      histogram.bins = fine_bins(low, histogram.high);
      histogram.furthest = histogram.high;
    }
  }

  // Finds the limit among the elements from `low` to `high`, of which the amounts before it are less than `need`, and
  // weighs what is within; or says that there are too many.
  METAL_FUNC bool listed(bool mass, uint low, uint high, uint64_t need) {
    clear_lists();
    Collector collector;
    collector.scored = scored;
    collector.limit = limit;
    collector.low = low;
    collector.high = high;
    collector.floor = floor;
    collector.list = shared.list;
    collector.sure = 0;
    visit<T, SIMDS>(row, length, simdgroup, lane, collector);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (shared.list.length() > uint(LISTED)) return false;
    settle(mass, low, high, need);
    limit = rank_of(shared.found[0], shared.found[1]);
    clear_bins();
    weigh_listed();
    finish_weights(collector.sure);
    return true;
  }

  METAL_FUNC void clear_lists() {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_in_group == 0) {
      atomic_store_explicit(shared.list.count, 0u, memory_order_relaxed);
      atomic_store_explicit(shared.short_list.count, 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Finds the limit among the listed elements: of many, among those of one bin of them.
  METAL_FUNC void settle(bool mass, uint low, uint high, uint64_t need) {
    const uint count = shared.list.length();
    if (count <= uint(SHORT_LIST)) {
      settle_among(shared.list, count, mass, low, high, need);
      return;
    }
    const Bins bins = fine_bins(low, high);
    clear_bins();
    for (uint i = thread_in_group; i < count; i += THREADS) {
      const uint bin = bins.of(shared.list.keys[i]);
      add_to(shared.lows + bin, shared.highs + bin, amount_of(mass, shared.list.keys[i]));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint64_t before = 0;
    const uint bin = reached_bin(need, before);
    for (uint i = thread_in_group; i < count; i += THREADS) {
      const Rank own = shared.list.rank(i);
      if (bins.of(own.key) == bin) shared.short_list.add(own, SHORT_LIST);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint left = shared.short_list.length();
    if (left <= uint(SHORT_LIST)) {
      settle_among(shared.short_list, left, mass, low, high, need - before);
    } else {
      const uint first = low + (bin << bins.shift);
      settle_among(shared.list, count, mass, first, first + (1u << bins.shift) - 1, need - before);
    }
  }

  // Finds the limit among the elements of a list from `low` to `high`.
  METAL_FUNC void settle_among(List list, uint count, bool mass, uint low, uint high, uint64_t need) {
    for (uint i = thread_in_group; i < count; i += THREADS) {
      const Rank own = list.rank(i);
      if (own.key < low || own.key > high) continue;
      uint64_t before = 0;
      for (uint j = 0; j < count; j++) {
        const Rank other = list.rank(j);
        if (other.key >= low && other.before(own)) before += amount_of(mass, other.key);
      }
      if (before < need && before + amount_of(mass, own.key) >= need) {
        shared.found[0] = own.key;
        shared.found[1] = own.index;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Adds the listed elements that are left to what their stretches weigh.
  METAL_FUNC void weigh_listed() {
    const uint stretch = stretch_of<T, SIMDS>(length);
    for (uint i = thread_in_group; i < shared.list.length(); i += THREADS) {
      const Rank own = shared.list.rank(i);
      if (own.key > floor || limit.before(own)) continue;
      const uint place = own.index / stretch;
      add_to(shared.lows + place, shared.highs + place, weight_of(own.key));
    }
  }

  METAL_FUNC void finish_weights(uint64_t sure) {
    const uint64_t own = lanes_sum(sure);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
      shared.partial[simdgroup] = own + read_both(shared.lows + simdgroup, shared.highs + simdgroup);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    weighed = true;
  }

  // Makes the limit the element of this key before which there are `equals` of it.
  METAL_FUNC void limit_to_equal(uint key, uint64_t equals) {
    Counter<true> counter;
    counter.scored = scored;
    counter.limit = rank_of(key, 0);
    counter.total = 0;
    visit<T, SIMDS>(row, length, simdgroup, lane, counter);
    sum(counter.total);
    limit = rank_of(key, locate(counter, equals));
  }

  // The first element up to which the counter's amounts add up to more than `mark`, where `partial` has those of each
  // stretch; 0 where they do not.
  template <typename Amounts>
  METAL_FUNC uint locate(Amounts amounts, uint64_t mark) {
    uint which = 0;
    uint64_t before = 0;
    while (which + 1 < uint(SIMDS) && before + shared.partial[which] <= mark) {
      before += shared.partial[which];
      which++;
    }
    const uint stretch = stretch_of<T, SIMDS>(length);
    const uint start = which * stretch;
    const uint end = start + stretch < length ? start + stretch : length;
    const uint each = (stretch + THREADS - 1) / THREADS;
    const uint own_start = start + thread_in_group * each;
    const uint own_end = own_start + each < end ? own_start + each : end;
    uint64_t own = 0;
    for (uint i = own_start; i < own_end; i++) own += amounts.amount(float(row[i]), i);
    sum(own);
    uint64_t reached = before + partial_sum(simdgroup) + lanes_before(own, lane);
    if (thread_in_group == 0) shared.found[0] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (reached <= mark && reached + own > mark) {
      for (uint i = own_start; i < own_end; i++) {
        const uint64_t amount = amounts.amount(float(row[i]), i);
        if (reached <= mark && reached + amount > mark) shared.found[0] = i;
        reached += amount;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return shared.found[0];
  }

  // Draws by random bits from what is left, and its sum of weights.
  METAL_FUNC uint draw(uint64_t random, thread uint64_t& total) {
    Counter<false> counter;
    counter.scored = scored;
    // The floor has all of its key.
    counter.limit = floor < limit.key ? rank_of(floor, 0xffffffffu) : limit;
    counter.total = 0;
    if (!weighed) {
      visit<T, SIMDS>(row, length, simdgroup, lane, counter);
      sum(counter.total);
    }
    total = partial_sum(SIMDS);
    return locate(counter, share_of(random, total));
  }
};

// ---- body ----
THREADGROUP_ARRAY(atomic_uint, lows, [1024]);
THREADGROUP_ARRAY(atomic_uint, highs, [1024]);
THREADGROUP_ARRAY(uint, keys_listed, [1024]);
THREADGROUP_ARRAY(uint, indices_listed, [1024]);
THREADGROUP_ARRAY(uint64_t, partial, [32]);
THREADGROUP_ARRAY(uint64_t, before_found, [1]);
THREADGROUP_ARRAY(uint, found, [2]);
THREADGROUP_ARRAY(uint, keys_short, [64]);
THREADGROUP_ARRAY(uint, indices_short, [64]);
THREADGROUP_ARRAY(atomic_uint, counts, [2]);
THREADGROUP_ARRAY(float, peaks, [32]);
THREADGROUP_ARRAY(float, least_peaks, [32]);
THREADGROUP_ARRAY(float, totals, [32]);
THREADGROUP_ARRAY(uint, places, [32]);
const uint length = x_shape[1];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row_index = threadgroup_position_in_grid.x;
auto row = x + size_t(row_index) * length;

Best<BEFORE> best;
best.value = -INFINITY;
best.index = 0xffffffffu;
best.total = 0.0f;
// The first time, the row comes from further away than a cache: more of it is asked for at once.
visit<T, SIMDS, 32 / int(Chunk<T>::SIZE)>(row, length, simdgroup, lane, best);

const float own_peak = best.value;
const float simd_peak = simd_max(own_peak);
const uint simd_place = simd_min(own_peak == simd_peak ? best.index : 0xffffffffu);
const float simd_least = simd_min(own_peak);
const float simd_base = metal::max(simd_peak, -LARGEST);
const float simd_total = simd_sum(best.total * metal::fast::exp2((own_peak - simd_base) * M_LOG2E_F));
if (lane == 0) {
  peaks[simdgroup] = simd_peak;
  places[simdgroup] = simd_place;
  least_peaks[simdgroup] = simd_least;
  totals[simdgroup] = simd_total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float peak = -INFINITY;
float least_peak = INFINITY;
uint greedy = 0;
for (uint i = 0; i < uint(SIMDS); i++) {
  if (peaks[i] > peak) {
    peak = peaks[i];
    greedy = places[i];
  }
  least_peak = least_peaks[i] < least_peak ? least_peaks[i] : least_peak;
}
const float base = metal::max(peak, -LARGEST);
float all = 0.0f;
for (uint i = 0; i < uint(SIMDS); i++) {
  all += totals[i] * metal::fast::exp2((peaks[i] - base) * M_LOG2E_F);
}

const float rate = rates[row_index];
uint token = greedy;
float logarithm = peak == -INFINITY ? -INFINITY : 0.0f;
if (rate > 0.0f) {
  Search<T, SIMDS, decltype(row)> search;
  search.row = row;
  search.length = length;
  search.scored.best = base;
  search.scored.rate = rate;
  search.limit = rank_of(LAST_KEY, 0xffffffffu);
  search.floor = as_type<uint>(floors[row_index]);
  search.shared.lows = lows;
  search.shared.highs = highs;
  search.shared.list.keys = keys_listed;
  search.shared.list.indices = indices_listed;
  search.shared.list.count = counts;
  search.shared.short_list.keys = keys_short;
  search.shared.short_list.indices = indices_short;
  search.shared.short_list.count = counts + 1;
  search.shared.partial = partial;
  search.shared.before = before_found;
  search.shared.found = found;
  search.simdgroup = simdgroup;
  search.lane = lane;
  search.thread_in_group = thread_index_in_threadgroup;
  search.weighed = false;

  const uint seats = top_k[row_index];
  const uint64_t dropped = spares[row_index];
  // Twice at most, in a loop so that it is one piece of code.
  for (uint step = 0; step < 2; step++) {
    const bool mass = step == 1;
    if (mass ? dropped == 0 : seats >= length) continue;
    search.reach = mass ? reach_of_weights(length, dropped)
                        : reach_of_seats(seats, (base - least_peak) * rate, SIMDS * 32);
    search.tighten(mass, seats, dropped);
  }
  uint64_t total = 0;
  token = search.draw(random_bits(keys[row_index], uint64_t(int64_t(positions[row_index]))), total);
  const float sum_of_weights = float(total) * 2.2737367544323206e-13f;
  const float distance = as_type<float>(search.scored.key(float(row[token])));
  logarithm = total == 0 ? -INFINITY : -distance - metal::log(sum_of_weights);
}
if (thread_index_in_threadgroup == 0) {
  tokens[row_index] = token;
  after[row_index] = logarithm;
    const float known = BEFORE ? float(row[token]) - base - metal::max(metal::log(all), -LARGEST) : 0.0f;
  // A maximum drops a NaN, which is to be seen.
  before[row_index] = all == all && peak < LARGEST ? known : NAN;
}

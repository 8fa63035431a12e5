// The gradient of qk_norm_rope.metal.
//
//   g       = dy turned backwards, by negated turns
//   r       = 1 / sqrt(mean(x^2) + EPS)
//   dx      = r * (w * g - x * r^2 * mean(w * g * x))
//   dweight = g * x * r, added up over the heads that one group works on
//
// queries, keys, query_weight, key_weight, starts, turns and constants as in qk_norm_rope.metal; dqueries_turned and
// dkeys_turned, the gradients of its outputs, and dqueries and dkeys, those of its inputs, as queries and keys;
// dquery_weight: [Q, D] of float, dkey_weight: [R, D] of float, a row for each group, to be added up. SIZE: D.
// The first QUERY_GROUPS groups work on queries, the others on keys, each on every so many-th group's worth of units.
// Grid: groups of 128 threads. Threadgroup memory: 16 * D bytes.

// Heads, `step` apart: each is read while the one before it is worked on. Adds what they give to `gradient`. All threads of
// a simdgroup go through `most`, since they add up together.
template <typename T, bool WHOLE, int LANES, int ROUNDS, bool INTERLEAVED, typename X, typename DY>
METAL_FUNC void add_heads(
    X x, DY dy, device T* dx, uint heads, uint most, size_t step, uint size, float eps,
    thread const Common<T, ROUNDS>& common, thread Values<T>* gradient) {
  Share<T> next_x[ROUNDS];
  Share<T> next_dy[ROUNDS];
  UNROLL
  for (int round = 0; round < ROUNDS; round++) {
    if (heads > 0) {
      next_x[round] = read_share<T, WHOLE>(x, common.spans[round]);
      next_dy[round] = read_share<T, WHOLE>(dy, common.spans[round]);
    }
  }
  for (uint head = 0; head < most; head++) {
    Share<T> xs[ROUNDS];
    Values<T> g[ROUNDS];
    float squares = 0.0f;
    float product = 0.0f;
    UNROLL
    for (int round = 0; round < ROUNDS; round++) {
      if (head < heads) {
        xs[round] = next_x[round];
        const Values<T> values = values_of<T>(xs[round]);
        g[round] = values_of<T>(next_dy[round]);
        if (common.turns[round]) g[round] = turned<INTERLEAVED>(g[round], common.turn[round]);
        squares += product_of<T>(values, values);
        UNROLL
        for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
          product += common.factor[round].at[i] * g[round].at[i] * values.at[i];
        }
      }
      if (head + 1 < heads) {
        next_x[round] = read_share<T, WHOLE>(x + (head + 1) * step, common.spans[round]);
        next_dy[round] = read_share<T, WHOLE>(dy + (head + 1) * step, common.spans[round]);
      }
    }
    squares = sum_of_lanes<LANES>(squares);
    product = sum_of_lanes<LANES>(product);
    const float scale = metal::rsqrt(squares / float(size) + eps);
    const float shrink = scale * scale * product / float(size);
    UNROLL
    for (int round = 0; round < ROUNDS; round++) {
      if (head < heads) {
        const Values<T> values = values_of<T>(xs[round]);
        Values<T> result;
        UNROLL
        for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
          gradient[round].at[i] += g[round].at[i] * values.at[i] * scale;
          result.at[i] =
              scale * (common.factor[round].at[i] * g[round].at[i] - values.at[i] * shrink);
        }
        write_share<T, WHOLE>(dx + head * step, common.spans[round], share_of<T>(result));
      }
    }
  }
}

// Every `workers`-th group of units, and one row of the weight's gradient.
template <
    typename T, typename W, int HEADS, int LANES, int ROUNDS, int DIMS, bool INTERLEAVED, typename X, typename DY,
    typename Weight, typename Starts, typename Turns>
METAL_FUNC void add_up(
    X x, DY dy, Weight weight, device T* dx, device float* dweight, threadgroup float* partial, Extent all,
    uint worker, uint workers, uint in_group, uint simdgroups, uint steps, Starts starts, Turns turns,
    float magnitude, Scaling scaling, bool whole) {
  const uint lane = in_group % LANES;
  const uint units_of_group = simdgroups * (32 / LANES);
  const uint most = most_heads<HEADS>(all);
  Common<T, ROUNDS> common;
  Values<T> gradient[ROUNDS];
  UNROLL
  for (int round = 0; round < ROUNDS; round++) {
    const uint slot = lane + round * LANES;
    common.spans[round] = spans_of<T, DIMS, INTERLEAVED>(slot, all.size);
    common.turns[round] = slot < turning_slots<T, DIMS>();
    common.factor[round] = factor_of<T, W>(weight, common.spans[round], scaling);
    UNROLL
    for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) gradient[round].at[i] = 0.0f;
  }

  const uint groups = groups_of<HEADS>(all, units_of_group);
  for (uint group = worker; group < groups; group += workers) {
    const Unit unit = unit_of<HEADS>(all, group * units_of_group + in_group / LANES);
    const int64_t position = position_of(unit.token, steps, starts);
    UNROLL
    for (int round = 0; round < ROUNDS; round++) {
      common.turn[round] = turn_of<T>(lane + round * LANES, DIMS / 2, position, turns, magnitude);
    }
    if (whole) {
      add_heads<T, true, LANES, ROUNDS, INTERLEAVED>(
          x + unit.first, dy + unit.first, dx + unit.first, unit.heads, most, unit.step, all.size,
          scaling.eps, common, gradient);
    } else {
      add_heads<T, false, LANES, ROUNDS, INTERLEAVED>(
          x + unit.first, dy + unit.first, dx + unit.first, unit.heads, most, unit.step, all.size,
          scaling.eps, common, gradient);
    }
  }

  // Over the units of a simdgroup, then over the simdgroups.
  UNROLL
  for (int round = 0; round < ROUNDS; round++) {
    UNROLL
    for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
      const int part = i / Chunk<T>::SIZE;
      const uint element = common.spans[round].first[part] + i % Chunk<T>::SIZE;
      const float sum = sum_of_units<LANES>(gradient[round].at[i]);
      if (in_group % 32 < LANES && element < common.spans[round].end[part]) {
        partial[in_group / 32 * all.size + element] = sum;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint element = in_group; element < all.size; element += simdgroups * 32) {
    float sum = 0.0f;
    for (uint simdgroup = 0; simdgroup < simdgroups; simdgroup++) {
      sum += partial[simdgroup * all.size + element];
    }
    dweight[size_t(worker) * all.size + element] = sum;
  }
}

// ---- body ----
THREADGROUP_ARRAY(float, partial, [4 * SIZE]);
const Extent queries_extent = extent_of(queries_shape);
const Extent keys_extent = extent_of(keys_shape);
const uint steps = queries_extent.outer * queries_extent.inner / starts_shape[0];
const float magnitude = as_type<float>(MAGNITUDE);
const Scaling scaling = scaling_of(EPS, UNIT_OFFSET);
const bool whole = has_whole_slots<T, DIMS>(queries_extent.size) && begins_a_chunk(queries) &&
    begins_a_chunk(keys) && begins_a_chunk(dqueries_turned) && begins_a_chunk(dkeys_turned) &&
    begins_a_chunk(dqueries) && begins_a_chunk(dkeys);
const uint group = threadgroup_position_in_grid.x;
const uint groups = threadgroups_per_grid.x;
if (group < QUERY_GROUPS) {
  add_up<T, V, HEADS, LANES, ROUNDS, DIMS, INTERLEAVED>(
      queries, dqueries_turned, query_weight, dqueries, dquery_weight, partial, queries_extent, group,
      QUERY_GROUPS, thread_index_in_threadgroup, simdgroups_per_threadgroup, steps, starts, turns, magnitude,
      scaling, whole);
} else {
  add_up<T, W, HEADS, LANES, ROUNDS, DIMS, INTERLEAVED>(
      keys, dkeys_turned, key_weight, dkeys, dkey_weight, partial, keys_extent, group - QUERY_GROUPS,
      groups - QUERY_GROUPS, thread_index_in_threadgroup, simdgroups_per_threadgroup, steps, starts, turns,
      magnitude, scaling, whole);
}

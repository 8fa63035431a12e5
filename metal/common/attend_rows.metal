// From the scores of sixteen queries of a simdgroup to their shares of the values, a few keys after the others.
//
// A score in units of log2(e) is `rate` times what is held of it, plus `shifts` of its row: so both are applied together with
// what is subtracted, in one instruction. What is held of it is the product of query and key, its share of the cap where
// there is one, and what ALiBi and a mask add, in that measure.

// `slope` is ALiBi's, and `fall` the same as scores hold it; `cap_scale` makes a product a share of the cap.
struct Measure {
  float rate;
  float cap_scale;
  float slope;
  float fall;
};

// SCALE, SOFT_CAP: bits of floats, no cap where zero.
template <int SCALE, int SOFT_CAP>
METAL_FUNC Measure measure_of(float slope) {
  const float scale = as_type<float>(SCALE);
  const float cap = SOFT_CAP == 0 ? scale : as_type<float>(SOFT_CAP);
  Measure measure;
  measure.rate = M_LOG2E_F * cap;
  measure.cap_scale = scale / cap;
  measure.slope = M_LOG2E_F * slope;
  measure.fall = measure.slope / measure.rate;
  return measure;
}

// The softmax of the two rows that a lane has of a tile.
struct Running {
  float most[2];
  float sums[2];
};

// Weights may grow to two to this before the sums are rescaled.
constant constexpr const float GROWTH = 8.0f;

METAL_FUNC Running nothing_seen() {
  Running running;
  for (int half = 0; half < 2; half++) {
    running.most[half] = -INFINITY;
    running.sums[half] = 0.0f;
  }
  return running;
}

// What the two rows that a lane has of the sixteen from `first_row` on see.
template <int LEFT, int RIGHT, bool SEGMENTED, typename Starts>
METAL_FUNC void look(
    thread Sight (&sights)[2], int first_row, int rows, int keys, Starts query_starts, Starts key_starts, int segments,
    uint lane) {
  for (int half = 0; half < 2; half++) {
    const int row = first_row + int(tile_place(0, lane).row) + half * TILE_HALVES_APART;
    sights[half] =
        sight_of<LEFT, RIGHT, SEGMENTED>(metal::min(row, rows - 1), rows, keys, query_starts, key_starts, segments);
  }
}

// Products of queries and keys, capped, as shares of the cap.
template <typename T, int COUNT>
METAL_FUNC void cap_products(thread Tile<float> (&scores)[COUNT], float scale) {
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) scores[t].set(e, tanh_of<T>(scores[t].value(e) * scale));
  }
}

// Lessens scores by how far the keys from `start` on are from the diagonals of their rows.
template <int COUNT>
METAL_FUNC void lean(
    thread Tile<float> (&scores)[COUNT], thread const Sight (&sights)[2], float fall, int start, uint lane) {
  const int first = tile_place(0, lane).column;
  float away[2];
  for (int half = 0; half < 2; half++) away[half] = float(sights[half].diagonal - start - first);
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const float beyond = float(t * 16 + int(tile_place(e, lane).column) - first);
      scores[t].set(e, metal::fma(-fall, metal::fabs(away[tile_half(e)] - beyond), scores[t].value(e)));
    }
  }
}

// The same of keys that are all before the diagonals: the sum of what begins at a lane's column and of what its rows begin
// with.
template <int COUNT>
METAL_FUNC void lean_before(
    thread Tile<float> (&scores)[COUNT], thread float (&shifts)[2], thread const Sight (&sights)[2], float fall,
    float slope, int start, uint lane) {
  const int first = tile_place(0, lane).column;
  for (int half = 0; half < 2; half++) shifts[half] = slope * float(start + first - sights[half].diagonal);
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const float beyond = float(t * 16 + int(tile_place(e, lane).column) - first);
      scores[t].set(e, metal::fma(fall, beyond, scores[t].value(e)));
    }
  }
}

// Makes scores minus infinity where keys are not seen, and adds a mask. `unit`: what a score of 1 is held as.
template <bool MASKED, int COUNT, typename Mask, typename Shape>
METAL_FUNC void hide(
    thread Tile<float> (&scores)[COUNT], thread const Sight (&sights)[2], int start, float unit, Mask mask,
    Shape mask_shape, int batch, int head, int first_row, int rows, uint lane) {
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const TilePlace place = tile_place(e, lane);
      const int key = start + t * 16 + int(place.column);
      const int row = metal::min(first_row + int(place.row), rows - 1);
      const float score = scores[t].value(e);
      scores[t].set(
          e, seen_score<MASKED>(score, sights[tile_half(e)], key, unit, mask, mask_shape, batch, head, row));
    }
  }
}

// Makes room for the highest of the scores: weights are relative to it, or to one not far below. From then on `shifts` are
// of weights.
template <int COUNT, int VALUE_TILES>
METAL_FUNC void rise(
    thread Running& running, thread Tile<float> (&results)[VALUE_TILES], thread Tile<float> (&scores)[COUNT],
    thread float (&shifts)[2], float rate) {
  float highest[2];
  bool grown = false;
  for (int half = 0; half < 2; half++) highest[half] = -INFINITY;
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      highest[tile_half(e)] = metal::max(highest[tile_half(e)], scores[t].value(e));
    }
  }
  UNROLL
  for (int half = 0; half < 2; half++) {
    highest[half] = tile_row_max(metal::fma(rate, highest[half], shifts[half]));
    grown |= highest[half] > running.most[half] + GROWTH;
  }
  if (simd_any(grown)) {
    float rescale[2];
    UNROLL
    for (int half = 0; half < 2; half++) {
      const float above = metal::max(running.most[half], highest[half]);
      rescale[half] = metal::fast::exp2(running.most[half] - base_of(above));
      running.most[half] = above;
      running.sums[half] *= rescale[half];
    }
    UNROLL
    for (int t = 0; t < VALUE_TILES; t++) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e++) results[t].set(e, results[t].value(e) * rescale[tile_half(e)]);
    }
  }
  UNROLL
  for (int half = 0; half < 2; half++) shifts[half] -= base_of(running.most[half]);
}

// Weights of scores, and their sum.
template <typename T, int COUNT>
METAL_FUNC void weigh(
    thread Tile<T> (&weights)[COUNT], thread Running& running, thread Tile<float> (&scores)[COUNT],
    thread const float (&shifts)[2], float rate) {
  UNROLL
  for (int t = 0; t < COUNT; t++) {
    UNROLL
    for (int e = 0; e < TILE_ELEMENTS; e++) {
      const int half = tile_half(e);
      const float weight = metal::fast::exp2(metal::fma(scores[t].value(e), rate, shifts[half]));
      running.sums[half] += weight;
      weights[t].set(e, T(weight));
    }
  }
}

// From products of sixteen queries from `first_row` on with the keys from `start` on to weights of these keys. `top` and
// `bottom`: what the first and the last see of the queries that take the same way.
template <
    bool CAPPED, bool ALIBI, bool MASKED, typename T, int COUNT, int VALUE_TILES, typename Mask, typename Shape>
METAL_FUNC void weigh_products(
    thread Tile<T> (&weights)[COUNT], thread Running& running, thread Tile<float> (&results)[VALUE_TILES],
    thread Tile<float> (&scores)[COUNT], thread const Sight (&sights)[2], Sight top, Sight bottom, Measure measure,
    int start, Mask mask, Shape mask_shape, int batch, int head, int first_row, int rows, uint lane) {
  constexpr int KEYS = 16 * COUNT;
  float shifts[2] = {0.0f, 0.0f};
  if (CAPPED) cap_products<T>(scores, measure.cap_scale);
  if (ALIBI && start + KEYS <= top.diagonal + 1) {
    lean_before(scores, shifts, sights, measure.fall, measure.slope, start, lane);
  } else if (ALIBI) {
    lean(scores, sights, measure.fall, start, lane);
  }
  if (MASKED || start < bottom.first || start + KEYS > top.last) {
    const float unit = M_LOG2E_F / measure.rate;
    hide<MASKED>(scores, sights, start, unit, mask, mask_shape, batch, head, first_row, rows, lane);
  }
  rise(running, results, scores, shifts, measure.rate);
  weigh(weights, running, scores, shifts, measure.rate);
}

// Writes the result and the log-sum-exp of a lane's two rows of the sixteen from `first_row` on. `sink`: in units of
// log2(e), minus infinity if there is none.
template <typename T, int VALUE_TILES>
METAL_FUNC void conclude(
    device T* y, device float* lse, thread Running& running, thread Tile<float> (&results)[VALUE_TILES], float sink,
    Heads all, int batch, int head, int first_row, uint lane) {
  const int first = tile_place(0, lane).column;
  UNROLL
  for (int half = 0; half < 2; half++) {
    const float base = base_of(metal::max(running.most[half], sink));
    const float factor = metal::fast::exp2(running.most[half] - base);
    const float sum = tile_row_sum(running.sums[half]) * factor + metal::fast::exp2(sink - base);
    const float share = sum == 0.0f ? 0.0f : factor / sum;
    const int row = first_row + int(tile_place(0, lane).row) + half * TILE_HALVES_APART;
    if (row >= all.length) continue;
    if (first == 0) {
      lse[(size_t(batch) * all.heads + head) * all.length + row] =
          sum == 0.0f ? -INFINITY : M_LN2_F * (base + metal::log2(sum));
    }
    device T* to = y + all.row(batch, head, row);
    const bool even = all.size % 2 == 0;
    UNROLL
    for (int t = 0; t < VALUE_TILES; t++) {
      UNROLL
      for (int e = 0; e < TILE_ELEMENTS; e += 2) {
        if (tile_half(e) != half) continue;
        const int column = t * 16 + int(tile_place(e, lane).column);
        const T left = T(results[t].value(e) * share);
        const T right = T(results[t].value(e + 1) * share);
        if (even && column < all.size) {
          store_pair<T>(to + column, left, right);
        } else {
          if (column < all.size) to[column] = left;
          if (column + 1 < all.size) to[column + 1] = right;
        }
      }
    }
  }
}

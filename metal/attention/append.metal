// Takes the keys and values of new tokens into the slots of a pool, where they lie, and passes the queries on: what attends to
// the pool takes them from here, and so comes after. Queries and keys are turned on the way, as in rope_qk.metal.
//
// queries: [N, H, 1, D] or [N, 1, H, D], keys: likewise of K heads of D, and values: of K heads of V, of T, by strides;
// positions: [N] of int and turns, by strides, DIMS, INTERLEAVED and MAGNITUDE as in rope_qk.metal; where DIMS is 0, nothing
// turns, and positions and turns are unread. slots: [C] of int, by strides, where the first C tokens go; what is no slot is
// nowhere.
// key_pool: [1, S, K, D] of E and value_pool: [1, S, K, V] of F, in rows, both written. E is T, or int8_t, or uint8_t for e4m3
// floats; then a number is divided by a scale, which goes into key_scales, [1, S, K] of float in rows, if KEYS_SCALED: the
// largest of its head is 127, or 448. F, VALUES_SCALED and value_scales likewise.
// passed: [N, H, D].
// Grid: along x a simdgroup for each head of queries, keys and values of a token. Threadgroup memory: none.

// The largest number of a stored head.
METAL_FUNC float largest_of(int8_t) { return 127.0f; }
METAL_FUNC float largest_of(uint8_t) { return 448.0f; }
template <typename E>
METAL_FUNC float largest_of(E) { return 1.0f; }

METAL_FUNC int8_t stored_as(float x, int8_t) { return int8_t(metal::isnan(x) ? 0.0f : metal::rint(x)); }

// To the nearest e4m3 float, of two the even one.
METAL_FUNC uint8_t stored_as(float x, uint8_t) {
  const uint bits = as_type<uint>(x);
  const uint sign = bits >> 24 & 0x80u;
  if (metal::isnan(x)) return uint8_t(0x7f);
  const uint size = bits & 0x7fffffffu;
  // Below 2^-6 numbers are 2^-9 apart. Above, the bits of a float but for those of its fraction that are left out, and with an
  // exponent that is 120 less.
  const float magnitude = as_type<float>(size);
  const uint rounded = magnitude < 0.015625f ? uint(metal::rint(magnitude * 512.0f))
                                             : ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - 960u;
  return uint8_t(sign | metal::min(rounded, 0x7eu));
}

template <typename E>
METAL_FUNC E stored_as(float x, E) { return E(x); }

// Where a head of a token begins.
template <typename From, typename Shape, typename Strides>
METAL_FUNC From head_of(From from, Shape shape, Strides strides, uint token, uint head) {
  return from + long(token) * strides[0] + long(head) * (shape[1] == 1 ? strides[2] : strides[1]);
}

// A head of a token by strides, in slots, of which each lane has every 32nd.
template <typename T, int DIMS, bool INTERLEAVED, typename From, typename Turns>
struct Head {
  From from;
  long step;
  uint size;
  int64_t position;
  Turns turns;
  float magnitude;
  bool whole;

  METAL_FUNC uint slots() const { return slots_of<T, DIMS>(size); }
  METAL_FUNC Spans spans(uint slot) const { return spans_of<T, DIMS, INTERLEAVED>(slot, size); }

  METAL_FUNC Share<T> read(Spans spans) const {
    if (step == 1) return whole ? read_share<T, true>(from, spans) : read_share<T, false>(from, spans);
    Share<T> share;
    UNROLL
    for (int part = 0; part < 2; part++) {
      UNROLL
      for (int i = 0; i < Chunk<T>::SIZE; i++) {
        const uint at = spans.first[part] + i;
        share.parts[part].values[i] = at < spans.end[part] ? from[long(at) * step] : T(0.0f);
      }
    }
    return share;
  }

  // Rounded to T, turned or not.
  METAL_FUNC Share<T> share(uint slot) const {
    const Share<T> found = read(spans(slot));
    if (slot >= turning_slots<T, DIMS>()) return found;
    const Turn<T> turn = turn_of<T>(slot, metal::max(DIMS / 2, 1), position, turns, magnitude);
    return share_of<T>(turned<INTERLEAVED>(values_of<T>(found), turn));
  }
};

template <typename T, int DIMS, bool INTERLEAVED, typename From, typename Turns>
METAL_FUNC Head<T, DIMS, INTERLEAVED, From, Turns> head_at(
    From from, long step, uint size, int64_t position, Turns turns, float magnitude) {
  Head<T, DIMS, INTERLEAVED, From, Turns> head;
  head.from = from;
  head.step = step;
  head.size = size;
  head.position = position;
  head.turns = turns;
  head.magnitude = magnitude;
  head.whole = has_whole_slots<T, DIMS>(size) && begins_a_chunk(from);
  return head;
}

template <typename T, typename H>
METAL_FUNC void store_plain(H head, device T* to, uint lane) {
  const bool whole = head.whole && begins_a_chunk(to);
  for (uint slot = lane; slot < head.slots(); slot += 32) {
    if (whole) {
      write_share<T, true>(to, head.spans(slot), head.share(slot));
    } else {
      write_share<T, false>(to, head.spans(slot), head.share(slot));
    }
  }
}

template <typename T, typename E, typename H>
METAL_FUNC void store_scaled(H head, device E* to, device float* scale, uint lane) {
  // Most heads have no more than a slot for each lane, which is kept: to turn it takes sines.
  Share<T> kept = {};
  float peak = 0.0f;
  for (uint slot = lane; slot < head.slots(); slot += 32) {
    const Share<T> share = head.share(slot);
    if (slot == lane) kept = share;
    const Values<T> values = values_of<T>(share);
    UNROLL
    for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
      const float x = values.at[i];
      peak = metal::max(peak, metal::isnan(x) ? INFINITY : metal::fabs(x));
    }
  }
  // Of a head with a number that is none, nothing is left.
  const float rate = metal::max(metal::simd_max(peak) / largest_of(E(0)), 1e-30f);
  for (uint slot = lane; slot < head.slots(); slot += 32) {
    const Spans spans = head.spans(slot);
    const Values<T> values = values_of<T>(slot == lane ? kept : head.share(slot));
    UNROLL
    for (int i = 0; i < 2 * Chunk<T>::SIZE; i++) {
      const int part = i / Chunk<T>::SIZE;
      const uint at = spans.first[part] + i % Chunk<T>::SIZE;
      if (at < spans.end[part]) to[at] = stored_as(values.at[i] / rate, E(0));
    }
  }
  if (lane == 0) *scale = rate;
}

// ---- body ----
const uint lane = thread_index_in_simdgroup;
const uint heads = queries_shape[1] * queries_shape[2];
const uint key_heads = key_pool_shape[2];
const uint parts = heads + 2 * key_heads;
const uint place =
    threadgroup_position_in_grid.x * (threads_per_threadgroup.x / 32) + simdgroup_index_in_threadgroup;
const uint token = place / parts;
if (token >= uint(queries_shape[0])) return;
const uint part = place % parts;
const int64_t position = DIMS == 0 ? 0 : positions[DIMS == 0 ? 0 : long(token) * positions_strides[0]];
const float magnitude = as_type<float>(MAGNITUDE);
const auto turning = strided(turns + 0, turns_strides[0]);
if (part < heads) {
  const uint size = queries_shape[3];
  const auto from = head_of(queries + 0, queries_shape, queries_strides, token, part);
  store_plain<T>(
      head_at<T, DIMS, INTERLEAVED>(from, queries_strides[3], size, position, turning, magnitude),
      passed + (size_t(token) * heads + part) * size,
      lane);
  return;
}
if (token >= uint(slots_shape[0])) return;
const int slot = slots[long(token) * slots_strides[0]];
if (slot < 0 || slot >= key_pool_shape[1]) return;
const bool is_key = part < heads + key_heads;
const uint head = part - heads - (is_key ? 0 : key_heads);
const size_t row = size_t(slot) * key_heads + head;
if (is_key) {
  const uint size = keys_shape[3];
  const auto from = head_of(keys + 0, keys_shape, keys_strides, token, head);
  const auto key =
      head_at<T, DIMS, INTERLEAVED>(from, keys_strides[3], size, position, turning, magnitude);
  device E* to = WRITTEN(E, key_pool) + row * size;
  if (KEYS_SCALED) {
    store_scaled<T>(key, to, WRITTEN(float, key_scales) + row, lane);
  } else {
    store_plain<T>(key, (device T*)to, lane);
  }
} else {
  const uint size = values_shape[3];
  const auto from = head_of(values + 0, values_shape, values_strides, token, head);
  const auto value = head_at<T, 0, false>(from, values_strides[3], size, 0, turning, magnitude);
  device F* to = WRITTEN(F, value_pool) + row * size;
  if (VALUES_SCALED) {
    store_scaled<T>(value, to, WRITTEN(float, value_scales) + row, lane);
  } else {
    store_plain<T>(value, (device T*)to, lane);
  }
}

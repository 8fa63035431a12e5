// Takes the keys and values of new tokens into the slots of a pool, where they lie, and passes the queries on: what attends to
// the pool takes them from here, and so comes after.
//
// queries: [N, H, 1, D] or [N, 1, H, D], keys: likewise of K heads of D, and values: of K heads of V, of T, by strides;
// slots: [C] of int, where the first C tokens go; what is no slot is nowhere.
// key_pool: [1, S, K, D] of E and value_pool: [1, S, K, V] of F, in rows, both written. E is T, or int8_t, or uint8_t for e4m3
// floats; then a number is divided by a scale, which goes into key_scales, [1, S, K] of float in rows, if KEYS_SCALED: the
// largest of its head is 127, or 448. F, VALUES_SCALED and value_scales likewise.
// passed: as queries.
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

template <typename E, typename From>
METAL_FUNC void store_scaled(From from, long step, device E* to, device float* scale, uint size, uint lane) {
  float peak = 0.0f;
  for (uint i = lane; i < size; i += 32) {
    const float x = float(from[long(i) * step]);
    peak = metal::max(peak, metal::isnan(x) ? INFINITY : metal::fabs(x));
  }
  // Of a head with a number that is none, nothing is left.
  const float rate = metal::max(metal::simd_max(peak) / largest_of(E(0)), 1e-30f);
  for (uint i = lane; i < size; i += 32) to[i] = stored_as(float(from[long(i) * step]) / rate, E(0));
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
if (part < heads) {
  const uint size = queries_shape[3];
  copy_run<T>(
      head_of(queries, queries_shape, queries_strides, token, part),
      queries_strides[3],
      passed + (size_t(token) * heads + part) * size,
      size,
      lane,
      32);
  return;
}
if (token >= uint(slots_shape[0])) return;
const int slot = slots[token];
if (slot < 0 || slot >= key_pool_shape[1]) return;
const bool is_key = part < heads + key_heads;
const uint head = part - heads - (is_key ? 0 : key_heads);
const size_t row = size_t(slot) * key_heads + head;
if (is_key) {
  const auto from = head_of(keys, keys_shape, keys_strides, token, head);
  device E* to = WRITTEN(E, key_pool) + row * keys_shape[3];
  if (KEYS_SCALED) {
    store_scaled(from, keys_strides[3], to, WRITTEN(float, key_scales) + row, keys_shape[3], lane);
  } else {
    copy_run<T>(from, keys_strides[3], (device T*)to, keys_shape[3], lane, 32);
  }
} else {
  const auto from = head_of(values, values_shape, values_strides, token, head);
  device F* to = WRITTEN(F, value_pool) + row * values_shape[3];
  if (VALUES_SCALED) {
    store_scaled(from, values_strides[3], to, WRITTEN(float, value_scales) + row, values_shape[3], lane);
  } else {
    copy_run<T>(from, values_strides[3], (device T*)to, values_shape[3], lane, 32);
  }
}

// Puts together what several groups found of the same rows, each over its own keys.
//
//   lse = log(sum over p of exp(lses[p])), y = sum over p of exp(lses[p] - lse) · parts[p]
//
// queries: of T, which y is of; nothing of it is read. parts: [P, N, VALUE_SIZE] and lses: [P, N], of float. sinks: [H] of
// float, if SINKS: logits that take part in the sum and have no value; row n has head n / INNER % H.
// y: [N, VALUE_SIZE] of T and lse: [N] of float; zeros and -inf where every part is -inf.
// Grid: a group of SIMDS simdgroups a row. Threadgroup memory: 4 · SIMDS · VALUE_SIZE bytes.

// ---- body ----
THREADGROUP_ARRAY(float, sums, [SIMDS * VALUE_SIZE]);
constexpr int PART = VALUE_SIZE <= 32 ? 1 : VALUE_SIZE <= 64 ? 2 : VALUE_SIZE <= 128 ? 4 : 8;
constexpr int AT_ONCE = 4;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.x;
const uint splits = parts_shape[0];
const size_t rows = parts_shape[1];

float top = -INFINITY;
float sink = -INFINITY;
if (SINKS) sink = float(sinks[SINKS ? row / INNER % sinks_shape[0] : 0]);
for (uint p = lane; p < splits; p += 32) {
  const float found = lses[p * rows + row];
  top = found > top ? found : top;
}
top = simd_max(top);
top = base_of(sink > top ? sink : top);
float total = 0.0f;
for (uint p = lane; p < splits; p += 32) total += metal::exp(lses[p * rows + row] - top);
total = simd_sum(total);
if (SINKS) total += metal::exp(sink - top);
const float share = total == 0.0f ? 0.0f : 1.0f / total;

float own[PART];
UNROLL
for (int i = 0; i < PART; i++) own[i] = 0.0f;
for (uint start = simdgroup; start < splits; start += SIMDS * AT_ONCE) {
  Part<float, PART> loaded[AT_ONCE];
  float weights[AT_ONCE];
  UNROLL
  for (int k = 0; k < AT_ONCE; k++) {
    const uint p = start + k * SIMDS;
    const size_t at = (p < splits ? p : start) * rows + row;
    weights[k] = p < splits ? metal::exp(lses[at] - top) * share : 0.0f;
    load_part<VALUE_SIZE % PART == 0, VALUE_SIZE>(loaded[k], parts + at * VALUE_SIZE, lane * PART, 1);
  }
  UNROLL
  for (int k = 0; k < AT_ONCE; k++) {
    for (int i = 0; i < PART; i++) own[i] += weights[k] * as_type<float>(loaded[k].bits(i));
  }
}
for (int i = 0; i < PART; i++) {
  if (lane * PART + i < VALUE_SIZE) sums[simdgroup * VALUE_SIZE + lane * PART + i] = own[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint at = simdgroup * 32 + lane; at < VALUE_SIZE; at += SIMDS * 32) {
  float sum = 0.0f;
  for (int s = 0; s < SIMDS; s++) sum += sums[s * VALUE_SIZE + at];
  y[size_t(row) * VALUE_SIZE + at] = T(sum);
}
if (simdgroup == 0 && lane == 0) lse[row] = total == 0.0f ? -INFINITY : top + metal::log(total);

// The sum over what blocks left one behind the other, of each element.
//
//   y = Σ_b parts[b]
//
// parts: [B, T, G, N] of float; y: [T, G, N] of float.
// Grid: groups of any size along x, a thread for each element. Threadgroup memory: none.

// ---- body ----
// As many loads as hide their latency.
constexpr uint AT_ONCE = 8;
const uint blocks = parts_shape[0];
const size_t count = size_t(parts_shape[1]) * parts_shape[2] * parts_shape[3];
const size_t at = thread_position_in_grid.x;
if (at < count) {
  float sum = 0.0f;
  for (uint first = 0; first < blocks; first += AT_ONCE) {
    float values[AT_ONCE];
    UNROLL
    for (uint i = 0; i < AT_ONCE; i++) values[i] = first + i < blocks ? parts[(first + i) * count + at] : 0.0f;
    UNROLL
    for (uint i = 0; i < AT_ONCE; i++) sum += values[i];
  }
  y[at] = sum;
}

// y[i] = w[i % 4] * x[i] + b, with vectors, swizzles and functions of T.
//
// x [N] T with N a multiple of 4, w [4] T in `constant`, b [1] T; y [N] T. One thread for four elements.

template <typename T, typename P>
METAL_FUNC vec<T, 4> load4(P source, uint index) {
  P p = source + 4 * index;
  return MAKE_VEC(T, 4)(p[0], p[1], p[2], p[3]);
}

// ---- body ----
const uint i = thread_position_in_grid.x;
const float4 values = float4(load4<T>(x, i));
const float4 weights = float4(load4<T>(w, 0));
float4 result = fma(values, weights, float4(static_cast<float>(b[0])));
result = float4(result.wz, result.y, result.x).wzyx;
for (uint j = 0; j < 4; j++) {
  y[4 * i + j] = static_cast<T>(result[j]);
}

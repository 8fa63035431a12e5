// <metal_simdgroup_matrix>: 8 by 8, two elements a lane, in the layout of Apple's GPUs.
#pragma once

namespace metal {
template <class T, int columns, int rows>
struct simdgroup_matrix {
  static_assert(columns == 8 && rows == 8, "Metal has simdgroup matrices of 8 by 8");
  vec<T, 2> elements;

  simdgroup_matrix() {}
  // Metal puts the value on the diagonal; make_filled_simdgroup_matrix fills.
  explicit simdgroup_matrix(T diagonal) {
    for (int k = 0; k < 2; k++) elements[k] = row() == column() + k ? diagonal : T(0);
  }
  thread vec<T, 2>& thread_elements() { return elements; }

  // Where this lane's first element stands; the second stands to the right of it.
  static int row() {
    uint lane = msl_lane();
    return (lane / 4 & 4) + lane / 2 % 4;
  }
  static int column() {
    uint lane = msl_lane();
    return (lane / 4 & 2) * 2 + lane % 2 * 2;
  }
  // The lane that has the element at (row, column), which is its element column % 2.
  static uint lane_of(int row, int column) {
    uint quad = (row & 4) | (column & 4) / 2;
    return quad * 4 + (row & 3) * 2 + (column & 3) / 2;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int columns, int rows>
METAL_FUNC simdgroup_matrix<T, columns, rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, columns, rows> m;
  m.elements[0] = value;
  m.elements[1] = value;
  return m;
}

// The whole simdgroup takes part, so its lanes meet here.
#define MSL_LOAD_STORE(space)                                                                   \
  template <class T, int c, int r>                                                              \
  METAL_FUNC void simdgroup_load(thread simdgroup_matrix<T, c, r>& m, const space T* source,    \
                                 ulong stride = c, ulong2 origin = ulong2{0, 0},                \
                                 bool transpose = false, MSL_SITE) {                            \
    msl::gather(stride, site);                                                                  \
    for (int k = 0; k < 2; k++) {                                                               \
      ulong y = transpose ? m.column() + k : m.row();                                           \
      ulong x = transpose ? m.row() : m.column() + k;                                           \
      m.elements[k] = source[(origin.y + y) * stride + origin.x + x];                           \
    }                                                                                           \
  }                                                                                             \
  template <class T, int c, int r>                                                              \
  METAL_FUNC void simdgroup_store(const thread simdgroup_matrix<T, c, r>& m, space T* target,   \
                                  ulong stride = c, ulong2 origin = ulong2{0, 0},               \
                                  bool transpose = false, MSL_SITE) {                           \
    msl::gather(stride, site);                                                                  \
    for (int k = 0; k < 2; k++) {                                                               \
      ulong y = transpose ? m.column() + k : m.row();                                           \
      ulong x = transpose ? m.row() : m.column() + k;                                           \
      target[(origin.y + y) * stride + origin.x + x] = m.elements[k];                           \
    }                                                                                           \
  }
MSL_LOAD_STORE(device)
MSL_LOAD_STORE(threadgroup)

// d = a b + c, accumulated in float whatever the element types are.
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                              const thread simdgroup_matrix<A, 8, 8>& a,
                                              const thread simdgroup_matrix<B, 8, 8>& b,
                                              const thread simdgroup_matrix<C, 8, 8>& c, MSL_SITE) {
  auto left = msl::gather(a.elements, site);
  auto right = msl::gather(b.elements, site);
  vec<D, 2> result;
  for (int k = 0; k < 2; k++) {
    int row = d.row(), column = d.column() + k;
    float sum = (float)c.elements[k];
    for (int i = 0; i < 8; i++) {
      float x = (float)left.values[d.lane_of(row, i)][i % 2];
      float y = (float)right.values[d.lane_of(i, column)][column % 2];
      sum += x * y;
    }
    result[k] = (D)sum;
  }
  d.elements = result;
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d,
                                   const thread simdgroup_matrix<A, 8, 8>& a,
                                   const thread simdgroup_matrix<B, 8, 8>& b, MSL_SITE) {
  auto zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero, site);
}
}  // namespace metal

// What differences to the largest score of a row are taken from: of nothing but -inf, exponentials are zero and not NaN.

METAL_FUNC float base_of(float peak) { return peak == -INFINITY ? 0.0f : peak; }

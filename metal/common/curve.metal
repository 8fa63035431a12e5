// Activations and their slopes at a point, all in f32.

// In the order of the variants of `Activation`.
enum Kind : int {
  IDENTITY,
  RELU,
  RELU6,
  RELU_SQUARED,
  LEAKY_RELU,
  SIGMOID,
  TANH,
  SILU,
  GELU,
  GELU_TANH,
  QUICK_GELU,
  MISH,
  SOFTPLUS,
  HARD_SIGMOID,
  HARD_SWISH
};

struct Curve {
  float value;
  float slope;
};

METAL_FUNC Curve curve_of(float value, float slope) {
  Curve curve;
  curve.value = value;
  curve.slope = slope;
  return curve;
}

METAL_FUNC float exponential_of(float x) {
  return metal::fast::exp2(1.44269504f * x);
}

// The sigmoid, and one less the sigmoid: neither by a difference, and nothing overflows.
struct Sigmoid {
  float value;
  float rest;
};

METAL_FUNC Sigmoid sigmoid_of(float x) {
  const float power = exponential_of(-metal::fabs(x));
  const float large = metal::fast::divide(1.0f, 1.0f + power);
  Sigmoid sigmoid;
  sigmoid.value = x < 0.0f ? power * large : large;
  sigmoid.rest = x < 0.0f ? large : power * large;
  return sigmoid;
}

// x · σ(w), where w has this slope.
METAL_FUNC Curve gated_by_sigmoid(float x, float w, float slope) {
  const Sigmoid sigmoid = sigmoid_of(w);
  return curve_of(x * sigmoid.value, sigmoid.value * (1.0f + x * slope * sigmoid.rest));
}

// The normal distribution and its density, to 1e-7: Zelen and Severo, Probability functions, in Abramowitz and Stegun,
// Handbook of Mathematical Functions, 1964, formula 26.2.17.
METAL_FUNC Curve normal_distribution(float x) {
  const float u = metal::fast::divide(1.0f, 1.0f + 0.2316419f * metal::fabs(x));
  const float density = 0.398942280f * metal::fast::exp2(-0.721347520f * x * x);
  const float series =
      u * (0.319381530f +
           u * (-0.356563782f + u * (1.781477937f + u * (-1.821255978f + u * 1.330274429f))));
  const float tail = density * series;
  return curve_of(x < 0.0f ? tail : 1.0f - tail, density);
}

// log(1 + power) for a power from 0 to 1, to 3e-7 of it: 2 · artanh(s) with s = power / (2 + power), a polynomial in s².
METAL_FUNC float log_of_one_and(float power) {
  const float s = metal::fast::divide(power, 2.0f + power);
  const float square = s * s;
  const float series =
      0.666663229f + square * (0.400245965f + square * (0.279651582f + square * 0.281577796f));
  return s * (2.0f + square * series);
}

METAL_FUNC Curve softplus_of(float x) {
  const float power = exponential_of(-metal::fabs(x));
  return curve_of((x < 0.0f ? 0.0f : x) + log_of_one_and(power), sigmoid_of(x).value);
}

// x · t with t = tanh(softplus(x)), which is a ratio of polynomials in exp(-|x|).
METAL_FUNC Curve mish_of(float x) {
  const float power = exponential_of(-metal::fabs(x));
  const float above = x < 0.0f ? power * (power + 2.0f) : 1.0f + 2.0f * power;
  const float missing = x < 0.0f ? 2.0f : 2.0f * power * power;
  const float t = above / (above + missing);
  const float rest = missing / (above + missing);
  return curve_of(x * t, t + x * rest * (1.0f + t) * sigmoid_of(x).value);
}

// NaN is clamped to NaN.
METAL_FUNC float clamped(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

METAL_FUNC Curve hard_sigmoid_of(float x) {
  const bool inside = x > -3.0f && x < 3.0f;
  return curve_of(clamped(x + 3.0f, 0.0f, 6.0f) / 6.0f, inside ? 1.0f / 6.0f : 0.0f);
}

template <int KIND>
METAL_FUNC Curve curve_at(float x) {
  const float positive = x < 0.0f ? 0.0f : x;
  if (KIND == RELU) return curve_of(positive, x > 0.0f ? 1.0f : 0.0f);
  if (KIND == RELU6) return curve_of(clamped(x, 0.0f, 6.0f), x > 0.0f && x < 6.0f ? 1.0f : 0.0f);
  if (KIND == RELU_SQUARED) return curve_of(positive * positive, 2.0f * positive);
  if (KIND == LEAKY_RELU) return curve_of(x < 0.0f ? 0.01f * x : x, x < 0.0f ? 0.01f : 1.0f);
  if (KIND == SIGMOID) {
    const Sigmoid sigmoid = sigmoid_of(x);
    return curve_of(sigmoid.value, sigmoid.value * sigmoid.rest);
  }
  if (KIND == TANH) {
    const float value = metal::tanh(x);
    return curve_of(value, 1.0f - value * value);
  }
  if (KIND == SILU) return gated_by_sigmoid(x, x, 1.0f);
  if (KIND == GELU) {
    const Curve normal = normal_distribution(x);
    return curve_of(x * normal.value, normal.value + x * normal.slope);
  }
  if (KIND == GELU_TANH) {
    // (1 + tanh(w / 2)) / 2 = σ(w), and w = √(8/π) · (x + 0.044715 x³).
    const float w = 1.59576912f * x * (1.0f + 0.044715f * x * x);
    return gated_by_sigmoid(x, w, 1.59576912f * (1.0f + 0.134145f * x * x));
  }
  if (KIND == QUICK_GELU) return gated_by_sigmoid(x, 1.702f * x, 1.702f);
  if (KIND == MISH) return mish_of(x);
  if (KIND == SOFTPLUS) return softplus_of(x);
  if (KIND == HARD_SIGMOID) return hard_sigmoid_of(x);
  if (KIND == HARD_SWISH) {
    const Curve gate = hard_sigmoid_of(x);
    return curve_of(x * gate.value, gate.value + x * gate.slope);
  }
  return curve_of(x, 1.0f);
}

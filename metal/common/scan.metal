// Steps of a scan, alone and joined, in f32.

// A step takes a state to decay · state + value in an affine scan, which is RULE 0, and to state ∘ value in others: a sum
// (1), a product (2), the larger (3), the smaller (4), the logarithm of a sum of exponentials (5).
struct Step {
  float decay;
  float value;
};

METAL_FUNC Step step_of(float decay, float value) {
  Step step;
  step.decay = decay;
  step.value = value;
  return step;
}

// The value that leaves a state as it is; of an affine scan, beside a decay of 1.
template <int RULE>
METAL_FUNC float nothing() {
  return RULE == 2 ? 1.0f : RULE == 3 || RULE == 5 ? -INFINITY : RULE == 4 ? INFINITY : 0.0f;
}

// The state after one step.
template <int RULE>
METAL_FUNC float advance(float state, Step step) {
  const float value = step.value;
  if (RULE == 0) return step.decay * state + value;
  if (RULE == 1) return state + value;
  if (RULE == 2) return state * value;
  if (RULE == 3) return value > state ? value : state;
  if (RULE == 4) return value < state ? value : state;
  const float top = value > state ? value : state;
  const float low = value > state ? state : value;
  // Of two infinities the difference is NaN.
  if (metal::fabs(top) == INFINITY) return top;
  return top + metal::log(1.0f + metal::exp(low - top));
}

// The state after the steps of a whole stretch, the product of whose decays may be infinite.
template <int RULE>
METAL_FUNC float pass(float state, Step stretch) {
  if (RULE == 0 && state == 0.0f) return stretch.value;
  return advance<RULE>(state, stretch);
}

// What two stretches do one after the other.
template <int RULE>
METAL_FUNC Step joined(Step first, Step second) {
  return step_of(RULE == 0 ? first.decay * second.decay : 1.0f, pass<RULE>(first.value, second));
}

// The stretch of time that a group scans: `count` steps, the first at `first`, each `by` from the one before.
struct Stretch {
  int first;
  int by;
  uint count;
};

template <bool REVERSE>
METAL_FUNC Stretch stretch_of(int begin, int end) {
  Stretch stretch;
  stretch.first = REVERSE ? end - 1 : begin;
  stretch.by = REVERSE ? -1 : 1;
  stretch.count = end > begin ? uint(end - begin) : 0;
  return stretch;
}

// Sums of 64 bits, over lanes and in counters that threads share: of integers, so that no order changes them.

METAL_FUNC uint64_t joined(uint low, uint high) { return (uint64_t(high) << 32) | uint64_t(low); }

METAL_FUNC uint64_t lanes_sum(uint64_t value) {
  for (ushort mask = 16; mask > 0; mask /= 2) {
    const uint low = simd_shuffle_xor(uint(value), mask);
    const uint high = simd_shuffle_xor(uint(value >> 32), mask);
    value += joined(low, high);
  }
  return value;
}

// The sum over the lanes before this one.
METAL_FUNC uint64_t lanes_before(uint64_t value, uint lane) {
  uint64_t sum = value;
  for (ushort delta = 1; delta < 32; delta *= 2) {
    const uint low = simd_shuffle_up(uint(sum), delta);
    const uint high = simd_shuffle_up(uint(sum >> 32), delta);
    if (lane >= uint(delta)) sum += joined(low, high);
  }
  return sum - value;
}

// Adds to a counter of two words.
METAL_FUNC void add_to(threadgroup atomic_uint* low, threadgroup atomic_uint* high, uint64_t value) {
  const uint part = uint(value);
  const uint old = atomic_fetch_add_explicit(low, part, memory_order_relaxed);
  const uint rest = uint(value >> 32) + (old + part < old ? 1u : 0u);
  if (rest != 0) atomic_fetch_add_explicit(high, rest, memory_order_relaxed);
}

METAL_FUNC uint64_t read_both(threadgroup atomic_uint* low, threadgroup atomic_uint* high) {
  return joined(
      atomic_load_explicit(low, memory_order_relaxed), atomic_load_explicit(high, memory_order_relaxed));
}

// Random bits of a key and a position, by the generator of Widynski, Squares: A Fast Counter-Based RNG, 2020
// (arXiv:2004.06278), and what a share of a sum is.

// fraction / 2^64 of total, as the reference rounds it.
METAL_FUNC uint64_t share_of(uint64_t fraction, uint64_t total) {
  const uint64_t high = fraction >> 32;
  const uint64_t low = fraction & 0xffffffffu;
  const uint64_t total_high = total >> 32;
  const uint64_t total_low = total & 0xffffffffu;
  return high * total_high + (high * total_low >> 32) + (low * total_high >> 32);
}

METAL_FUNC uint64_t squares(uint64_t counter, uint64_t key) {
  const uint64_t y = counter * key;
  const uint64_t z = y + key;
  uint64_t x = y * y + y;
  x = (x >> 32) | (x << 32);
  x = x * x + z;
  x = (x >> 32) | (x << 32);
  x = x * x + y;
  x = (x >> 32) | (x << 32);
  return (x * x + z) >> 32;
}

METAL_FUNC uint64_t random_bits(uint64_t key, uint64_t position) {
  return (squares(2 * position, key) << 32) | squares(2 * position + 1, key);
}

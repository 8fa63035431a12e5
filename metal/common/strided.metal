// Numbers `step` apart, read as if they stood side by side.

template <typename Pointer>
struct Strided {
  Pointer start;
  long step;
  METAL_FUNC auto operator[](long i) const { return start[i * step] + 0; }
};

template <typename Pointer>
METAL_FUNC Strided<Pointer> strided(Pointer start, long step) {
  Strided<Pointer> all;
  all.start = start;
  all.step = step;
  return all;
}

// Copying, shared out over threads. Stands on chunk.metal.

// `size` elements that are `step` apart into a row, by `threads` threads of which this is number `first`.
template <typename T, typename From, typename To>
METAL_FUNC void copy_run(From from, long step, To to, size_t size, uint first, uint threads) {
  constexpr uint AT_ONCE = Chunk<T>::SIZE;
  if (step == 1 && size % AT_ONCE == 0 && begins_a_chunk(from) && begins_a_chunk(to)) {
    for (size_t i = first * AT_ONCE; i < size; i += threads * AT_ONCE) {
      store_chunk<T>(to + i, load_chunk<T>(from + i));
    }
  } else {
    for (size_t i = first; i < size; i += threads) to[i] = from[long(i) * step];
  }
}

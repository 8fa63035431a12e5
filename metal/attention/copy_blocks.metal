// Copies blocks of a pool, where they lie, and passes the slots of new tokens on: what writes to the pool takes them from here,
// and so comes after.
//
// from, to: [M] of int: the blocks that are read and those that are written, none of which is one of the others; what is no
// block is left out. slots: [C] of int. queries: [N, H, 1, D] or [N, 1, H, D] of T, unread: what is copied waits for them.
// key_pool: [1, S, K, D] of E, value_pool: [1, S, K, V] of F, in rows, BLOCK slots to a block, and key_scales and value_scales,
// [1, S, K] of float, if KEYS_SCALED and VALUES_SCALED: all written.
// passed: as slots.
// Grid: threads along x share a copy; a copy along y. Threadgroup memory: none.

// Shared out over `threads` threads, of which this is number `first`.
template <typename T>
METAL_FUNC void copy_block(device T* pool, int from, int to, size_t size, uint first, uint threads) {
  constexpr uint AT_ONCE = Chunk<T>::SIZE;
  device T* const source = pool + from * size;
  device T* const target = pool + to * size;
  if (size % AT_ONCE == 0 && begins_a_chunk(source) && begins_a_chunk(target)) {
    for (size_t i = first * AT_ONCE; i < size; i += threads * AT_ONCE) {
      store_chunk<T>(target + i, load_chunk<T>(source + i));
    }
  } else {
    for (size_t i = first; i < size; i += threads) target[i] = source[i];
  }
}

// ---- body ----
const uint first = thread_position_in_grid.x;
const uint threads = threads_per_threadgroup.x * threadgroups_per_grid.x;
const uint copy = threadgroup_position_in_grid.y;
if (copy == 0) {
  for (uint i = first; i < uint(slots_shape[0]); i += threads) passed[i] = slots[i];
}
const int source = from[copy];
const int target = to[copy];
const int blocks = key_pool_shape[1] / BLOCK;
if (source < 0 || source >= blocks || target < 0 || target >= blocks) return;
const size_t rows = size_t(BLOCK) * key_pool_shape[2];
copy_block(WRITTEN(E, key_pool), source, target, rows * key_pool_shape[3], first, threads);
copy_block(WRITTEN(F, value_pool), source, target, rows * value_pool_shape[3], first, threads);
if (KEYS_SCALED) copy_block(WRITTEN(float, key_scales), source, target, rows, first, threads);
if (VALUES_SCALED) copy_block(WRITTEN(float, value_scales), source, target, rows, first, threads);

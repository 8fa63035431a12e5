//! A cache that grows with its sequence.

use mlx_rs::{
    Array,
    ops::{
        concatenate,
        indexing::{TryIndexMutOp, TryIndexOp},
        zeros_dtype,
    },
};

use super::{Cache, contract::check_queries};
use crate::{
    attention::{FlashAttentionOptions, KvCache, flash_attention},
    check::Check,
    error::Result,
    layout::Layout,
    rope::RopeOffset,
};

/// Options of [`SimpleKvCache`].
#[derive(Debug, Clone)]
pub struct SimpleKvCacheOptions {
    /// How many tokens each allocation makes room for. Default: 256.
    pub step: i32,
    /// The most tokens it may hold; without one it grows as long as there is memory.
    pub max_len: Option<i32>,
}

impl SimpleKvCacheOptions {
    /// The default of [`SimpleKvCacheOptions::step`].
    pub const DEFAULT_STEP: i32 = 256;
}

impl Default for SimpleKvCacheOptions {
    fn default() -> Self {
        Self { step: Self::DEFAULT_STEP, max_len: None }
    }
}

/// The keys and values of one layer, in two buffers that grow in steps.
///
/// A new token is written into room already allocated: MLX updates a buffer in place as long as
/// nothing else holds it, so a step costs the size of a token, not of the history. Therefore let go
/// of the arrays that [`Self::update`] returned before the next step is evaluated; holding them is
/// safe and costs a copy of the buffer.
///
/// The first update fixes the batch, the heads, the sizes and the dtype.
///
/// # Example
/// ```
/// use mlx_primitives::{Layout, cache::SimpleKvCache};
/// use mlx_rs::Array;
///
/// let mut cache = SimpleKvCache::new();
/// let token = Array::ones::<f32>(&[1, 1, 2, 64])?;
/// cache.update(&token, &token, Layout::Bshd)?;
/// let (keys, _) = cache.update(&token, &token, Layout::Bshd)?;
/// assert_eq!(keys.shape(), [1, 2, 2, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct SimpleKvCache {
    options: SimpleKvCacheOptions,
    buffers: Option<Buffers>,
    len: i32,
}

/// `[B, H_kv, capacity, D]` and `[B, H_kv, capacity, D_v]`, equally long.
#[derive(Debug, Clone)]
struct Buffers {
    keys: Array,
    values: Array,
}

const CHECK: Check = Check::op("SimpleKvCache");

impl SimpleKvCache {
    /// An empty cache that grows without limit.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty cache.
    ///
    /// # Errors
    /// When `step` or `max_len` is below one.
    pub fn with_options(options: SimpleKvCacheOptions) -> Result<Self> {
        CHECK.at_least("step", options.step, 1)?;
        CHECK.at_least("max_len", options.max_len.unwrap_or(1), 1)?;
        Ok(Self { options, buffers: None, len: 0 })
    }

    /// How many tokens fit before the next allocation.
    pub fn capacity(&self) -> i32 {
        self.buffers.as_ref().map_or(0, Buffers::capacity)
    }

    /// Forgets every token from position `len` on; the room stays allocated.
    ///
    /// # Errors
    /// When `len` is negative or above the length. Nothing is changed then.
    pub fn truncate(&mut self, len: i32) -> Result<()> {
        let holds = (0..=self.len).contains(&len);
        CHECK.value(holds, "len", format_args!("be between 0 and {}", self.len), len)?;
        self.len = len;
        Ok(())
    }

    /// Appends the keys and values of new tokens and returns those of all tokens, in `layout`.
    ///
    /// # Shapes
    /// In [`Layout::Bshd`]; the other one alike:
    /// - `keys`: `[B, S, H_kv, D]`, `values`: `[B, S, H_kv, D_v]`
    /// - result: `[B, S_kv, H_kv, D]` and `[B, S_kv, H_kv, D_v]`, with `S_kv` the new length
    ///
    /// # Errors
    /// When the arrays do not fit each other or what is held. Nothing is changed then.
    pub fn update(
        &mut self,
        keys: &Array,
        values: &Array,
        layout: Layout,
    ) -> Result<(Array, Array)> {
        let appended = self.appended(keys, values, layout)?;
        let all = appended.all(layout)?;
        self.keep(appended);
        Ok(all)
    }

    /// What is held, in `layout`, or nothing before the first update.
    ///
    /// # Errors
    /// When MLX cannot slice the buffers.
    pub fn contents(&self, layout: Layout) -> Result<Option<(Array, Array)>> {
        self.buffers.as_ref().map(|buffers| buffers.first(self.len, layout)).transpose()
    }

    /// Checks new tokens and returns how many tokens there will be.
    fn checked_len(&self, keys: &Array, values: &Array, layout: Layout) -> Result<i32> {
        CHECK.shape("keys", keys, &layout.axes("B", "S", "H_kv", "D"))?;
        CHECK.floating("keys", keys)?;
        let [batch, tokens, heads, _] = layout.dims(keys);
        CHECK.shape("values", values, &layout.axes(batch, tokens, heads, "D_v"))?;
        CHECK.dtype_among("values", values, &[keys.dtype()])?;
        if let Some(held) = &self.buffers {
            held.check_fit(keys, values, layout)?;
        }
        let max_len = self.options.max_len.unwrap_or(i32::MAX);
        let len = self.len.checked_add(tokens).filter(|&len| len <= max_len);
        let found = i64::from(self.len) + i64::from(tokens);
        CHECK.known(len, "keys", format_args!("fit into {max_len} tokens"), found)
    }

    fn appended(&self, keys: &Array, values: &Array, layout: Layout) -> Result<Appended> {
        let len = self.checked_len(keys, values, layout)?;
        let keys = layout.swap_with_bhsd(keys)?;
        let values = layout.swap_with_bhsd(values)?;
        let mut buffers = self.with_room(len, &keys, &values)?;
        buffers.write(self.len, len, &keys, &values)?;
        Ok(Appended { buffers, len })
    }

    fn keep(&mut self, Appended { buffers, len }: Appended) {
        self.buffers = Some(buffers);
        self.len = len;
    }

    /// Buffers with room for `len` tokens that hold what these hold.
    fn with_room(&self, len: i32, keys: &Array, values: &Array) -> Result<Buffers> {
        let Some(held) = &self.buffers else {
            let capacity = self.rounded(len);
            return Ok(Buffers { keys: room(keys, capacity)?, values: room(values, capacity)? });
        };
        if len <= held.capacity() {
            return Ok(held.clone());
        }
        let extra = self.rounded(len) - held.capacity();
        Ok(Buffers {
            keys: concatenate(&[&held.keys, &room(keys, extra)?], 2)?,
            values: concatenate(&[&held.values, &room(values, extra)?], 2)?,
        })
    }

    fn rounded(&self, len: i32) -> i32 {
        let step = self.options.step;
        let rounded = ((len - 1) / step + 1).saturating_mul(step);
        rounded.min(self.options.max_len.unwrap_or(i32::MAX)).max(len)
    }
}

/// What a cache will hold once nothing can fail any more.
struct Appended {
    buffers: Buffers,
    len: i32,
}

impl Appended {
    fn all(&self, layout: Layout) -> Result<(Array, Array)> {
        self.buffers.first(self.len, layout)
    }
}

impl KvCache for SimpleKvCache {
    fn offset(&self) -> RopeOffset<'_> {
        RopeOffset::At(self.len)
    }

    fn attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        let appended = self.appended(keys, values, options.layout)?;
        check_queries(CHECK, queries, keys, options.layout)?;
        let (keys, values) = appended.all(options.layout)?;
        let attended = flash_attention(queries, keys, values, options)?;
        self.keep(appended);
        Ok(attended)
    }
}

impl Cache for SimpleKvCache {
    fn len(&self) -> i32 {
        self.len
    }

    fn positions(&self) -> Vec<i32> {
        (0..self.len).collect()
    }

    fn nbytes(&self) -> usize {
        self.buffers.as_ref().map_or(0, |buffers| buffers.keys.nbytes() + buffers.values.nbytes())
    }

    fn trimmable(&self) -> i32 {
        self.len
    }

    fn trim(&mut self, tokens: i32) -> Result<()> {
        let expected = format_args!("be between 0 and {}", self.len);
        CHECK.value(self.can_trim(tokens), "tokens", expected, tokens)?;
        self.len -= tokens;
        Ok(())
    }

    fn fork(&self) -> Result<Box<dyn Cache>> {
        Ok(Box::new(self.clone()))
    }

    fn clear(&mut self) {
        self.buffers = None;
        self.len = 0;
    }
}

impl Buffers {
    fn capacity(&self) -> i32 {
        self.keys.dim(2)
    }

    fn check_fit(&self, keys: &Array, values: &Array, layout: Layout) -> Result<()> {
        let [batch, _, heads, size] = Layout::Bhsd.dims(&self.keys);
        CHECK.shape("keys", keys, &layout.axes(batch, "S", heads, size))?;
        CHECK.dtype_among("keys", keys, &[self.keys.dtype()])?;
        let [.., value_size] = Layout::Bhsd.dims(&self.values);
        CHECK.shape("values", values, &layout.axes(batch, "S", heads, value_size))
    }

    fn write(&mut self, from: i32, to: i32, keys: &Array, values: &Array) -> Result<()> {
        if from == to {
            return Ok(());
        }
        self.keys.try_index_mut((.., .., from..to, ..), keys)?;
        self.values.try_index_mut((.., .., from..to, ..), values)?;
        Ok(())
    }

    /// Views of the first `len` tokens.
    fn first(&self, len: i32, layout: Layout) -> Result<(Array, Array)> {
        let keys = self.keys.try_index((.., .., 0..len, ..))?;
        let values = self.values.try_index((.., .., 0..len, ..))?;
        Ok((layout.swap_with_bhsd(&keys)?, layout.swap_with_bhsd(&values)?))
    }
}

/// Zeros shaped like `tokens` but `capacity` long.
fn room(tokens: &Array, capacity: i32) -> Result<Array> {
    let shape = tokens.shape();
    Ok(zeros_dtype(&[shape[0], shape[1], capacity, shape[3]], tokens.dtype())?)
}

//! A cache that grows with its sequence.

use mlx_rs::Array;

use super::{
    Cache, KvForm,
    contract::{check_queries, check_trim},
    file::Saved,
    store::{Forms, Store, Tokens},
};
use crate::{
    attention::{FlashAttentionOptions, KvCache, flash_attention},
    check::Check,
    error::Result,
    layout::Layout,
    rope::RopeOffset,
    sizes::div_ceil,
};

/// Options of [`SimpleKvCache`].
#[derive(Debug, Clone)]
pub struct SimpleKvCacheOptions {
    /// How many tokens each allocation makes room for. Default: 256.
    pub step: i32,
    /// The most tokens it may hold. Default: none; it grows as long as there is memory.
    pub max_len: Option<i32>,
    /// How keys are stored. Default: as they come.
    pub keys: KvForm,
    /// How values are stored. Default: as they come.
    pub values: KvForm,
}

impl SimpleKvCacheOptions {
    /// The default of [`SimpleKvCacheOptions::step`].
    pub const DEFAULT_STEP: i32 = 256;
}

impl Default for SimpleKvCacheOptions {
    fn default() -> Self {
        let (keys, values) = (KvForm::default(), KvForm::default());
        Self { step: Self::DEFAULT_STEP, max_len: None, keys, values }
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
    store: Option<Store>,
    len: i32,
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
        Ok(Self { options, store: None, len: 0 })
    }

    /// How many tokens fit before the next allocation.
    pub fn capacity(&self) -> i32 {
        self.store.as_ref().map_or(0, Store::slots)
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
        let (store, len) = self.appended(keys, values, layout)?;
        let all = store.read(0, len)?.in_layout(layout)?;
        (self.store, self.len) = (Some(store), len);
        Ok(all)
    }

    /// What is held, in `layout`, or nothing before the first update.
    ///
    /// # Errors
    /// When MLX cannot slice the buffers.
    pub fn contents(&self, layout: Layout) -> Result<Option<(Array, Array)>> {
        let all = |store: &Store| store.read(0, self.len)?.in_layout(layout);
        self.store.as_ref().map(all).transpose()
    }

    fn forms(&self) -> Forms {
        Forms { keys: self.options.keys, values: self.options.values }
    }

    /// The length with that many tokens more.
    fn longer(&self, tokens: i32) -> Result<i32> {
        let max_len = self.options.max_len.unwrap_or(i32::MAX);
        let len = self.len.checked_add(tokens).filter(|&len| len <= max_len);
        let found = i64::from(self.len) + i64::from(tokens);
        CHECK.known(len, "keys", format_args!("fit into {max_len} tokens"), found)
    }

    /// What will be held once nothing can fail any more, and how many tokens.
    fn appended(&self, keys: &Array, values: &Array, layout: Layout) -> Result<(Store, i32)> {
        let held = self.store.as_ref();
        let tokens = Tokens::new(CHECK, [keys, values], layout, self.forms(), held)?;
        let len = self.longer(tokens.count())?;
        let slots = self.rounded(len);
        Ok((Store::appended(held, self.len, &tokens, self.forms(), slots)?, len))
    }

    fn rounded(&self, len: i32) -> i32 {
        let step = self.options.step;
        let rounded = div_ceil(len.max(1), step).saturating_mul(step);
        rounded.min(self.options.max_len.unwrap_or(i32::MAX)).max(len)
    }

    /// A cache that holds what a row of others does.
    pub(super) fn holding(store: Store, len: i32) -> Self {
        let Forms { keys, values } = store.forms();
        let options = SimpleKvCacheOptions { keys, values, ..Default::default() };
        Self { options, store: Some(store), len }
    }

    pub(super) fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    pub(super) fn restore(saved: &Saved) -> Result<Self> {
        let len = saved.number("len")?;
        let store = saved.store()?;
        let Forms { keys, values } = saved.forms()?;
        let (step, max_len) = (saved.number("step")?, saved.optional("max_len")?);
        let options = SimpleKvCacheOptions { step, max_len, keys, values };
        let fits = (0..=store.as_ref().map_or(0, Store::slots)).contains(&len);
        saved.check(fits, "len", "be no more than there are slots", len)?;
        Ok(Self { store, len, ..Self::with_options(options)? })
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
        let (store, len) = self.appended(keys, values, options.layout)?;
        check_queries(CHECK, queries, keys, options.layout)?;
        let (keys, values) = store.read(0, len)?.in_layout(options.layout)?;
        let attended = flash_attention(queries, keys, values, options)?;
        (self.store, self.len) = (Some(store), len);
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
        self.store.as_ref().map_or(0, Store::nbytes)
    }

    fn trimmable(&self) -> i32 {
        self.len
    }

    fn trim(&mut self, tokens: i32) -> Result<()> {
        check_trim(CHECK, self, tokens)?;
        self.len -= tokens;
        Ok(())
    }

    fn fork(&self) -> Result<Box<dyn Cache>> {
        Ok(Box::new(self.clone()))
    }

    fn clear(&mut self) {
        self.store = None;
        self.len = 0;
    }

    fn saved(&self) -> Result<Saved> {
        let mut saved = Saved::new(Self::KIND, self.forms(), self.store.as_ref());
        saved.set("len", self.len);
        saved.set("step", self.options.step);
        saved.set_optional("max_len", self.options.max_len);
        Ok(saved)
    }
}

impl SimpleKvCache {
    pub(super) const KIND: &str = "simple";
}

//! A cache that keeps the last tokens, and the first ones if asked to.

use mlx_rs::Array;

use super::{
    Cache, KvForm,
    contract::{check_queries, check_trim},
    file::Saved,
    mask,
    ring::Ring,
    store::{Forms, Store, Tokens},
};
use crate::{
    attention::{FlashAttentionOptions, KvCache, Window, flash_attention},
    check::Check,
    error::Result,
    layout::Layout,
    rope::RopeOffset,
    uploads,
};

/// Options of [`RotatingKvCache`].
#[derive(Debug, Clone)]
pub struct RotatingKvCacheOptions {
    /// How many of the last tokens a token sees, itself included: 1 or more. That is one more than
    /// [`Window::left`](crate::attention::Window::left), which does not count the token itself.
    pub window: i32,
    /// How many of the first tokens every token sees as well, however far back they are. Default: none.
    pub sinks: i32,
    /// How many tokens beyond the window are kept, so that as many, and one more, can always be taken back. Default: none.
    pub undo: i32,
    /// How keys are stored. Default: as they come.
    pub keys: KvForm,
    /// How values are stored. Default: as they come.
    pub values: KvForm,
}

impl RotatingKvCacheOptions {
    /// A window of this many tokens, and defaults otherwise.
    pub fn new(window: i32) -> Self {
        let (keys, values) = (KvForm::default(), KvForm::default());
        Self { window, sinks: 0, undo: 0, keys, values }
    }
}

/// The keys and values of one layer for the first tokens and the last ones, in buffers of a fixed size.
///
/// Without sinks it is the cache of a model with a sliding window. A new token overwrites the oldest one, so that a step
/// costs the size of a token; tokens keep their positions, and masks count those, whatever was let go. Stretches of several
/// tokens are exact too: each token sees its own window.
///
/// ALiBi is refused once there is a gap between the sinks and the window, as its distances would skip it.
///
/// # Example
/// ```
/// use mlx_primitives::{cache::{Cache, RotatingKvCache, RotatingKvCacheOptions}, layers::Attention};
/// use mlx_rs::{Array, module::Module};
///
/// let options = RotatingKvCacheOptions { sinks: 4, ..RotatingKvCacheOptions::new(16) };
/// let (mut attention, mut cache) = (Attention::new(64, 4)?, RotatingKvCache::with_options(options)?);
/// attention.forward((&Array::ones::<f32>(&[1, 100, 64])?, &mut cache))?;
/// assert_eq!((cache.len(), cache.positions().len()), (100, 20));
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Xiao et al., [Efficient Streaming Language Models with Attention
/// Sinks](https://arxiv.org/abs/2309.17453), 2023.
#[derive(Debug, Clone)]
pub struct RotatingKvCache {
    options: RotatingKvCacheOptions,
    ring: Ring,
    store: Option<Store>,
    len: i32,
    /// The first position after the sinks that was not overwritten.
    oldest: i32,
}

const CHECK: Check = Check::op("RotatingKvCache");

/// Keys in some order, and what there is to know of it.
struct Seen {
    tokens: Tokens,
    /// Of each key.
    positions: Vec<i32>,
    /// Whether the keys are in the order of their positions.
    in_order: bool,
}

impl RotatingKvCache {
    pub(super) const KIND: &str = "rotating";

    /// An empty cache for a sliding window, in which a token sees itself and those before it, `window` in all.
    ///
    /// # Errors
    /// When `window` is below one.
    pub fn new(window: i32) -> Result<Self> {
        Self::with_options(RotatingKvCacheOptions::new(window))
    }

    /// An empty cache.
    ///
    /// # Errors
    /// When `window` is below one, `sinks` or `undo` below zero, or their sum above 2^31 - 1.
    pub fn with_options(options: RotatingKvCacheOptions) -> Result<Self> {
        let RotatingKvCacheOptions { window, sinks, undo, .. } = options;
        CHECK.at_least("window", window, 1)?;
        CHECK.at_least("sinks", sinks, 0)?;
        CHECK.at_least("undo", undo, 0)?;
        let slots = window.checked_add(undo).and_then(|kept| kept.checked_add(sinks));
        CHECK.known(slots, "window", "fit into 2147483647 tokens with sinks and undo", window)?;
        let ring = Ring { sinks, size: window + undo };
        Ok(Self { options, ring, store: None, len: 0, oldest: sinks })
    }

    fn forms(&self) -> Forms {
        Forms { keys: self.options.keys, values: self.options.values }
    }

    /// The first position after the sinks that a token at `position` sees.
    fn visible_from(&self, position: i32) -> i32 {
        (position - self.options.window + 1).max(self.options.sinks)
    }

    /// What will be held with the new tokens, and what they see.
    fn appended(&self, tokens: &Tokens, raw: bool) -> Result<(Store, Seen)> {
        let held = match &self.store {
            Some(store) => store.clone(),
            None => Store::like(tokens, self.forms(), self.ring.slots())?,
        };
        let mut written = held.clone();
        let end = self.len + tokens.count();
        for (slot, part) in self.ring.writes(self.len..end) {
            let first = part.start - self.len;
            let part = tokens.last_from(first)?.first_to(part.end - self.len - first)?;
            written.write(slot, &part)?;
        }
        // Unless the first new token sees something that the last one overwrites, all is read from where it is written,
        // and so MLX need not keep what was there before.
        let overwrites = tokens.count() > self.options.undo + 1;
        let seen = match (overwrites, raw) {
            (true, _) => self.seen_before(&held, tokens)?,
            (false, true) => self.seen_where_it_lies(&written, end)?,
            (false, false) => self.seen_in_order(&written, end)?,
        };
        Ok((written, seen))
    }

    /// What was held before, and then the new tokens.
    fn seen_before(&self, held: &Store, tokens: &Tokens) -> Result<Seen> {
        let mut parts = Vec::new();
        let before = self.visible_from(self.len)..self.len;
        let mut positions: Vec<_> =
            (0..self.len.min(self.ring.sinks)).chain(before.clone()).collect();
        for slots in self.ring.reads(self.len, before) {
            parts.push(held.read(slots.start, slots.end)?);
        }
        positions.extend(self.len..self.len + tokens.count());
        parts.push(tokens.as_stored(self.forms())?);
        Ok(Seen { tokens: Tokens::joined(&parts)?, positions, in_order: true })
    }

    fn seen_in_order(&self, written: &Store, end: i32) -> Result<Seen> {
        let window = self.visible_from(self.len)..end;
        let positions: Vec<_> = (0..end.min(self.ring.sinks)).chain(window.clone()).collect();
        let parts = self.ring.reads(end, window).into_iter();
        let parts = parts.map(|slots| written.read(slots.start, slots.end));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let tokens = match parts.is_empty() {
            true => written.read(0, 0)?,
            false => Tokens::joined(&parts)?,
        };
        Ok(Seen { tokens, positions, in_order: true })
    }

    fn seen_where_it_lies(&self, written: &Store, end: i32) -> Result<Seen> {
        let positions = self.ring.positions(end);
        let tokens = written.read(0, positions.len() as i32)?;
        Ok(Seen { tokens, positions, in_order: false })
    }

    /// Which keys each new token may see because of the window: `[S, S_kv]`.
    fn visible(&self, seen: &Seen, count: i32, left: Option<i32>) -> Result<Array> {
        let keys = uploads::integers(seen.positions.clone());
        let queries = uploads::integers((self.len..self.len + count).collect()).expand_dims(-1)?;
        let first = queries.subtract(uploads::int(self.options.window - 1))?;
        let sink = keys.lt(uploads::int(self.options.sinks))?;
        let visible = keys.ge(first)?.logical_or(sink)?;
        let Some(left) = left else { return Ok(visible) };
        Ok(visible.logical_and(keys.ge(queries.subtract(uploads::int(left))?)?)?)
    }

    /// Whether some new token may not see some of these keys because of the window.
    fn hides(&self, seen: &Seen, count: i32) -> bool {
        let first = self.visible_from(self.len + count - 1);
        seen.positions.iter().any(|&position| position >= self.ring.sinks && position < first)
    }

    fn attended(
        &self,
        queries: &Array,
        seen: &Seen,
        options: FlashAttentionOptions,
    ) -> Result<Array> {
        let count = options.layout.dims(queries)[1];
        let is_run = seen.in_order && seen.positions.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        let alibi = options.alibi_slopes.is_none() || is_run;
        let expected = "be none once tokens between sinks and window are let go";
        CHECK.value(alibi, "alibi_slopes", expected, "some")?;
        let left = options.window.left;
        let hides = self.hides(seen, count);
        let by_window = hides && self.ring.sinks == 0 && is_run;
        let by_mask = (hides && !by_window) || (left.is_some() && !is_run);

        let own = by_mask.then(|| self.visible(seen, count, left)).transpose()?;
        let asked = options.mask.map(|asked| mask::columns(asked, &seen.positions)).transpose()?;
        let mask = mask::both(own, asked)?;
        let nearest = self.options.window - 1;
        let left = match (by_window, by_mask) {
            (true, _) => Some(left.map_or(nearest, |left| left.min(nearest))),
            (_, true) => None,
            _ => left,
        };
        let window = Window { left, ..options.window };
        let (keys, values) = seen.tokens.in_layout(options.layout)?;
        let options = FlashAttentionOptions { mask: mask.as_ref(), window, ..options };
        flash_attention(queries, keys, values, options)
    }

    pub(super) fn restore(saved: &Saved) -> Result<Self> {
        let Forms { keys, values } = saved.forms()?;
        let options = RotatingKvCacheOptions {
            window: saved.number("window")?,
            sinks: saved.number("sinks")?,
            undo: saved.number("undo")?,
            keys,
            values,
        };
        let empty = Self::with_options(options)?;
        let (store, len) = (saved.store()?, saved.number("len")?);
        let slots = store.as_ref().map_or(0, Store::slots);
        let fits = slots == if len == 0 && store.is_none() { 0 } else { empty.ring.slots() };
        saved.check(fits, "window", "be that of the arrays, with sinks and undo", slots)?;
        saved.check(len >= 0, "len", "be at least 0", len)?;
        let oldest = saved.number("oldest")?;
        let (first, last) = (empty.oldest.max(len - empty.ring.size), empty.oldest.max(len));
        let held = (first..=last).contains(&oldest);
        saved.check(held, "oldest", "be a position that is held", oldest)?;
        Ok(Self { store, len, oldest, ..empty })
    }
}

impl KvCache for RotatingKvCache {
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
        let layout: Layout = options.layout;
        let tokens = Tokens::new(CHECK, [keys, values], layout, self.forms(), self.store.as_ref())?;
        check_queries(CHECK, queries, keys, layout)?;
        let len = self.len.checked_add(tokens.count());
        let found = i64::from(self.len) + i64::from(tokens.count());
        let len = CHECK.known(len, "keys", "end before position 2147483647", found)?;
        if let Some(mask) = options.mask {
            let [batch, count, heads, _] = layout.dims(queries);
            CHECK.mask(mask, &[batch, heads, count, len])?;
        }
        // The order of keys is of no consequence to a single query, unless something counts from the last.
        let counts = options.alibi_slopes.is_some() || options.window.left.is_some();
        let raw =
            tokens.count() == 1 && !counts && options.window.right.is_none_or(|right| right >= 0);
        let (store, seen) = self.appended(&tokens, raw)?;
        let attended = self.attended(queries, &seen, options)?;
        self.store = Some(store);
        self.len = len;
        self.oldest = self.oldest.max(len - self.ring.size);
        Ok(attended)
    }
}

impl Cache for RotatingKvCache {
    fn len(&self) -> i32 {
        self.len
    }

    fn positions(&self) -> Vec<i32> {
        (0..self.len.min(self.ring.sinks)).chain(self.oldest..self.len).collect()
    }

    fn nbytes(&self) -> usize {
        self.store.as_ref().map_or(0, Store::nbytes)
    }

    fn trimmable(&self) -> i32 {
        match self.oldest > self.ring.sinks {
            true => (self.len - self.oldest - self.options.window + 1).max(0),
            false => self.len,
        }
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
        (self.store, self.len, self.oldest) = (None, 0, self.ring.sinks);
    }

    fn saved(&self) -> Result<Saved> {
        let RotatingKvCacheOptions { window, sinks, undo, .. } = self.options;
        let mut saved = Saved::new(Self::KIND, self.forms(), self.store.as_ref());
        let facts = [("window", window), ("sinks", sinks), ("undo", undo)];
        let facts = facts.into_iter().chain([("len", self.len), ("oldest", self.oldest)]);
        facts.for_each(|(name, fact)| saved.set(name, fact));
        Ok(saved)
    }
}

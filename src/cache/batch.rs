//! Sequences of several lengths side by side.

use mlx_rs::{
    Array,
    ops::{arange, concatenate, indexing::TryIndexOp, zeros_dtype},
};

use super::{
    Cache, KvForm, SimpleKvCache,
    contract::{check_queries, check_trim},
    file::Saved,
    mask,
    store::{Forms, Store, Tokens},
};
use crate::{
    attention::{FlashAttentionOptions, KvCache, flash_attention},
    check::Check,
    error::Result,
    rope::RopeOffset,
    uploads,
};

/// Options of [`BatchKvCache`].
#[derive(Debug, Clone, Default)]
pub struct BatchKvCacheOptions {
    /// How keys are stored. Default: as they come.
    pub keys: KvForm,
    /// How values are stored. Default: as they come.
    pub values: KvForm,
}

/// The keys and values of one layer for sequences of several lengths, whose last tokens stand side by side.
///
/// A shorter sequence begins after padding, so that all go on in the same column. Each row has positions of its own, and
/// sees none of its padding: rows of padding attend to nothing, and yield zero. Masks and [`Cache::len`] count columns.
///
/// Rows can be let go, added, taken out and put together between steps.
///
/// # Example
/// ```
/// use mlx_primitives::{cache::{BatchKvCache, Cache}, layers::Attention};
/// use mlx_rs::{Array, module::Module};
///
/// // Prompts of 7 and 5 tokens, the second after 2 of padding.
/// let (mut attention, mut cache) = (Attention::new(64, 4)?, BatchKvCache::new(&[0, 2])?);
/// attention.forward((&Array::ones::<f32>(&[2, 7, 64])?, &mut cache))?;
/// attention.forward((&Array::ones::<f32>(&[2, 1, 64])?, &mut cache))?;
///
/// // The first is done.
/// cache.filter(&[1])?;
/// assert_eq!((cache.len(), cache.left_padding()), (6, &[0][..]));
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone)]
pub struct BatchKvCache {
    padding: Vec<i32>,
    /// `[B]`: where each row goes on.
    offsets: Array,
    forms: Forms,
    store: Option<Store>,
    len: i32,
}

const CHECK: Check = Check::op("BatchKvCache");
const STEP: i32 = 256;

impl BatchKvCache {
    pub(super) const KIND: &str = "batch";

    /// An empty cache whose rows will begin after that much padding.
    ///
    /// # Errors
    /// When there is no row, or padding is negative.
    pub fn new(left_padding: &[i32]) -> Result<Self> {
        Self::with_options(left_padding, BatchKvCacheOptions::default())
    }

    /// The same, which stores its keys and values so.
    ///
    /// # Errors
    /// When there is no row, or padding is negative.
    pub fn with_options(left_padding: &[i32], options: BatchKvCacheOptions) -> Result<Self> {
        CHECK.value(!left_padding.is_empty(), "left_padding", "be that of one row or more", 0)?;
        left_padding.iter().try_for_each(|&padding| CHECK.at_least("left_padding", padding, 0))?;
        let padding = left_padding.to_vec();
        let offsets = offsets(0, &padding);
        let forms = Forms { keys: options.keys, values: options.values };
        Ok(Self { padding, offsets, forms, store: None, len: 0 })
    }

    /// The sequences of caches, one row each, side by side.
    ///
    /// # Errors
    /// When there is none, one of them is empty or holds more than one row, or they hold different heads, sizes, dtypes or
    /// forms.
    pub fn merge(caches: &[&SimpleKvCache]) -> Result<Self> {
        CHECK.value(!caches.is_empty(), "caches", "be one or more", 0)?;
        let mut merged: Option<Self> = None;
        for cache in caches {
            let row = Self::of_row(cache)?;
            match &mut merged {
                Some(merged) => merged.extend(&row)?,
                None => merged = Some(row),
            }
        }
        CHECK.known(merged, "caches", "be one or more", 0)
    }

    fn of_row(cache: &SimpleKvCache) -> Result<Self> {
        let store = CHECK.known(cache.store(), "caches", "hold something", "an empty one")?;
        CHECK.value(store.batch() == 1, "caches", "have one row each", store.batch())?;
        let len = cache.len();
        let padding = vec![0];
        let offsets = offsets(len, &padding);
        let (forms, store) = (store.forms(), Some(store.clone()));
        Ok(Self { padding, offsets, forms, store, len })
    }

    /// How many columns of padding each row begins with.
    pub fn left_padding(&self) -> &[i32] {
        &self.padding
    }

    /// Keeps these rows, in this order, and lets go of padding that all of them begin with.
    ///
    /// # Errors
    /// When there is none, or one is not of this cache. Nothing is changed then.
    pub fn filter(&mut self, rows: &[i32]) -> Result<()> {
        CHECK.value(!rows.is_empty(), "rows", "be one or more", 0)?;
        rows.iter().try_for_each(|&row| self.check_row(row))?;
        let padding: Vec<_> = rows.iter().map(|&row| self.padding[row as usize]).collect();
        let shared = padding.iter().copied().min().unwrap_or(0).min(self.len);
        let index = uploads::integers(rows.to_vec());
        let store = self.store.as_ref().map(|store| {
            store.map(|array| Ok(array.take_axis(&index, 0)?.try_index((.., .., shared.., ..))?))
        });
        self.store = store.transpose()?;
        self.padding = padding.into_iter().map(|padding| padding - shared).collect();
        self.go_on(self.len - shared);
        Ok(())
    }

    /// Adds the rows of another cache below.
    ///
    /// # Errors
    /// When one of the two is empty, or they hold different heads, sizes, dtypes or forms. Nothing is changed then.
    pub fn extend(&mut self, other: &Self) -> Result<()> {
        let empty = "hold something, as this one";
        let (own, others) = (self.store.as_ref(), other.store.as_ref());
        let (own, others) = (CHECK.known(own, "self", "hold something", "an empty one")?, others);
        let others = CHECK.known(others, "other", empty, "an empty one")?;
        let alike = own.is_like(others);
        CHECK.value(alike, "other", "have the same heads, sizes, dtype and forms", "others")?;
        let len = self.len.max(other.len);
        let longest = |cache: &Self| cache.padding.iter().max().map_or(0, |&pad| pad - cache.len);
        let fits = longest(self).max(longest(other)).checked_add(len);
        let expected = "leave each row less than 2^31 columns of padding";
        CHECK.known(fits, "other", expected, format_args!("{len} columns"))?;
        let stores = [own.shifted(self.len, len)?, others.shifted(other.len, len)?];
        let joined = Store::joined(&stores, |arrays| Ok(concatenate(&arrays, 0)?))?;
        let mut padding: Vec<_> = self.padding.iter().map(|pad| pad - self.len + len).collect();
        padding.extend(other.padding.iter().map(|pad| pad - other.len + len));
        (self.store, self.padding) = (joined, padding);
        self.go_on(len);
        Ok(())
    }

    /// The sequence of one row, without its padding.
    ///
    /// # Errors
    /// When there is no such row, or nothing is held.
    pub fn extract(&self, row: i32) -> Result<SimpleKvCache> {
        self.check_row(row)?;
        let store = CHECK.known(self.store.as_ref(), "self", "hold something", "an empty one")?;
        let padding = self.padding[row as usize].min(self.len);
        let part = (row..row + 1, .., padding..self.len, ..);
        let store = store.map(|array| Ok(array.try_index(part.clone())?))?;
        Ok(SimpleKvCache::holding(store, self.len - padding))
    }

    fn check_row(&self, row: i32) -> Result<()> {
        let expected = format_args!("be one of {}", self.padding.len());
        CHECK.value((0..self.padding.len() as i32).contains(&row), "row", expected, row)
    }

    fn go_on(&mut self, len: i32) {
        self.len = len;
        self.offsets = offsets(len, &self.padding);
    }

    /// What will be held with new tokens.
    fn appended(&self, tokens: &Tokens) -> Result<(Store, i32)> {
        let len = self.len.checked_add(tokens.count());
        let found = i64::from(self.len) + i64::from(tokens.count());
        let len = CHECK.known(len, "keys", "end before column 2147483647", found)?;
        let slots = (len.saturating_add(STEP - 1) / STEP * STEP).max(len);
        Ok((Store::appended(self.store.as_ref(), self.len, tokens, self.forms, slots)?, len))
    }

    /// `[B, 1, 1, S_kv]`: true beyond the padding; `None` if there is none.
    fn visible(&self, len: i32) -> Result<Option<Array>> {
        if self.padding.iter().all(|&padding| padding == 0) {
            return Ok(None);
        }
        let padding = uploads::integers(self.padding.clone()).reshape(&[-1, 1, 1, 1])?;
        Ok(Some(arange::<i32, i32>(None, len, None)?.ge(padding)?))
    }

    pub(super) fn restore(saved: &Saved) -> Result<Self> {
        let (store, len) = (saved.store()?, saved.number("len")?);
        let fits = (0..=store.as_ref().map_or(0, Store::slots)).contains(&len);
        saved.check(fits, "len", "be no more than there are slots", len)?;
        let Forms { keys, values } = saved.forms()?;
        let options = BatchKvCacheOptions { keys, values };
        let mut cache = Self::with_options(&saved.numbers("padding")?, options)?;
        let rows = cache.padding.len() as i32;
        let fits = store.as_ref().is_none_or(|store| store.batch() == rows);
        saved.check(fits, "padding", "be that of each row", rows)?;
        cache.store = store;
        cache.go_on(len);
        Ok(cache)
    }
}

impl Store {
    /// The first `len` slots, after others of zeros, `longer` in all.
    fn shifted(&self, len: i32, longer: i32) -> Result<Self> {
        self.map(|array| {
            let held = array.try_index((.., .., ..len, ..))?;
            if len == longer {
                return Ok(held);
            }
            let before = [array.dim(0), array.dim(1), longer - len, array.dim(3)];
            Ok(concatenate(&[zeros_dtype(&before, array.dtype())?, held], 2)?)
        })
    }
}

/// `[B]`: where each row goes on, which is before 0 within padding.
fn offsets(len: i32, padding: &[i32]) -> Array {
    uploads::integers(padding.iter().map(|padding| len - padding).collect())
}

impl KvCache for BatchKvCache {
    fn offset(&self) -> RopeOffset<'_> {
        RopeOffset::PerRow(&self.offsets)
    }

    fn attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        options: FlashAttentionOptions<'_>,
    ) -> Result<Array> {
        let layout = options.layout;
        let tokens = Tokens::new(CHECK, [keys, values], layout, self.forms, self.store.as_ref())?;
        check_queries(CHECK, queries, keys, layout)?;
        let rows = self.padding.len() as i32;
        CHECK.value(keys.dim(0) == rows, "keys", format_args!("have {rows} rows"), keys.dim(0))?;
        let (store, len) = self.appended(&tokens)?;
        if let Some(mask) = options.mask {
            let [batch, count, heads, _] = layout.dims(queries);
            CHECK.mask(mask, &[batch, heads, count, len])?;
        }
        let mask = mask::both(self.visible(len)?, options.mask.cloned())?;
        let options = FlashAttentionOptions { mask: mask.as_ref(), ..options };
        let (keys, values) = store.read(0, len)?.in_layout(layout)?;
        let attended = flash_attention(queries, keys, values, options)?;
        self.store = Some(store);
        self.go_on(len);
        Ok(attended)
    }
}

impl Cache for BatchKvCache {
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
        let most = self.padding.iter().copied().max().unwrap_or(0);
        (self.len - most).max(0)
    }

    fn trim(&mut self, tokens: i32) -> Result<()> {
        check_trim(CHECK, self, tokens)?;
        self.go_on(self.len - tokens);
        Ok(())
    }

    fn fork(&self) -> Result<Box<dyn Cache>> {
        Ok(Box::new(self.clone()))
    }

    fn clear(&mut self) {
        self.store = None;
        self.go_on(0);
    }

    fn saved(&self) -> Result<Saved> {
        let mut saved = Saved::new(Self::KIND, self.forms, self.store.as_ref());
        saved.set("len", self.len);
        let padding: Vec<_> = self.padding.iter().map(ToString::to_string).collect();
        saved.set("padding", padding.join(" "));
        Ok(saved)
    }
}

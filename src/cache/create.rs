//! Caches by the names of their kinds.

use std::str::FromStr;

use mlx_rs::Dtype;

use super::{
    Cache, Eviction, KvForm, PagedKv, PagedKvOptions, PagedPool, PagedPoolOptions, RotatingKvCache,
    RotatingKvCacheOptions, SimpleKvCache, SimpleKvCacheOptions,
};
use crate::{
    attention::BlockForm,
    check::Check,
    error::{Error, Result},
};

const CHECK: Check = Check::op("create_kv_cache");

/// The kinds of cache that [`create_kv_cache`] makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvCacheKind {
    /// [`SimpleKvCache`].
    Simple,
    /// [`RotatingKvCache`] without sinks.
    Sliding,
    /// [`RotatingKvCache`].
    Rotating,
    /// [`SimpleKvCache`] in fewer bits: int8 unless the configuration says otherwise.
    Compressed,
    /// [`PagedPool`] with a [`PagedKv`] for each layer.
    Paged,
}

impl KvCacheKind {
    const NAMES: [(&str, Self); 6] = [
        ("simple", Self::Simple),
        ("sliding", Self::Sliding),
        ("rotating", Self::Rotating),
        ("compressed", Self::Compressed),
        ("quantized", Self::Compressed),
        ("paged", Self::Paged),
    ];
}

impl FromStr for KvCacheKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let kind = Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind);
        let expected = "be simple, sliding, rotating, compressed, quantized or paged";
        CHECK.known(kind, "kind", expected, format_args!("{name:?}"))
    }
}

/// What caches are made by. A kind reads what concerns it.
#[derive(Debug, Clone)]
pub struct KvCacheConfig {
    /// Layers of the model.
    pub num_layers: usize,
    /// Key and value heads. Paged.
    pub num_kv_heads: i32,
    /// The size of a key and of a value. Paged.
    pub head_dim: i32,
    /// Of keys and values: f32, f16 or bf16. Paged; other kinds take what comes. Default: f16.
    pub dtype: Dtype,
    /// The most tokens. Simple and compressed. Default: no limit.
    pub max_len: Option<i32>,
    /// How many of the last tokens are seen, the newest included. Sliding and rotating. Default: 4096.
    pub window: i32,
    /// How many of the first tokens are seen as well. Rotating. Default: 4.
    pub sinks: i32,
    /// How many tokens more can be taken back. Sliding and rotating. Default: none.
    pub undo: i32,
    /// How keys are stored. All but paged. Default: as they come, and int8 if compressed.
    pub keys: Option<KvForm>,
    /// How values are stored, likewise.
    pub values: Option<KvForm>,
    /// How blocks hold keys. Paged. Default: as they come.
    pub block_keys: BlockForm,
    /// How blocks hold values. Paged. Default: as they come.
    pub block_values: BlockForm,
    /// How many bytes all layers may take together. Paged. Default: 8 GB.
    pub max_bytes: usize,
    /// How many tokens a block holds. Paged. Default: 16.
    pub block_size: i32,
    /// Which block that nobody uses is let go first. Paged.
    pub eviction: Eviction,
}

impl KvCacheConfig {
    /// For a model of this many layers with such heads, and defaults otherwise.
    pub fn new(num_layers: usize, num_kv_heads: i32, head_dim: i32) -> Self {
        Self {
            num_layers,
            num_kv_heads,
            head_dim,
            dtype: Dtype::Float16,
            max_len: None,
            window: 4096,
            sinks: 4,
            undo: 0,
            keys: None,
            values: None,
            block_keys: BlockForm::Plain,
            block_values: BlockForm::Plain,
            max_bytes: 8_000_000_000,
            block_size: PagedPoolOptions::DEFAULT_BLOCK_SIZE,
            eviction: Eviction::default(),
        }
    }

    fn simple(&self, form: KvForm) -> Result<Box<dyn Cache>> {
        let options = SimpleKvCacheOptions {
            max_len: self.max_len,
            keys: self.keys.unwrap_or(form),
            values: self.values.unwrap_or(form),
            ..Default::default()
        };
        Ok(Box::new(SimpleKvCache::with_options(options)?))
    }

    fn rotating(&self, sinks: i32) -> Result<Box<dyn Cache>> {
        let options = RotatingKvCacheOptions {
            sinks,
            undo: self.undo,
            keys: self.keys.unwrap_or_default(),
            values: self.values.unwrap_or_default(),
            ..RotatingKvCacheOptions::new(self.window)
        };
        Ok(Box::new(RotatingKvCache::with_options(options)?))
    }

    fn each(&self, new: impl Fn() -> Result<Box<dyn Cache>>) -> Result<KvCaches> {
        (0..self.num_layers).map(|_| new()).collect::<Result<_>>().map(KvCaches::Layers)
    }

    /// A pool of as many blocks as the budget allows, and storage for each layer.
    fn paged(&self) -> Result<KvCaches> {
        let mut options = PagedKvOptions {
            blocks: 2,
            block_size: self.block_size,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            value_dim: None,
            dtype: self.dtype,
            keys: self.block_keys,
            values: self.block_values,
        };
        for (name, form) in [("keys", self.keys), ("values", self.values)] {
            let form = form.unwrap_or_default();
            let expected = "be as they come for blocks, which have block_keys and block_values,";
            CHECK.value(form == KvForm::Plain, name, expected, format_args!("{form:?}"))?;
        }
        // Before a pool is made for tokens that take no bytes.
        options.check()?;
        let token_bytes = options.token_bytes().saturating_mul(self.num_layers);
        let mut pool = PagedPoolOptions::within(self.max_bytes, token_bytes, self.block_size)?;
        pool.eviction = self.eviction.clone();
        options.blocks = pool.blocks;
        let pool = Box::new(PagedPool::new(pool)?);
        let layers = (0..self.num_layers).map(|_| PagedKv::new(&options)).collect::<Result<_>>()?;
        Ok(KvCaches::Paged { pool, layers })
    }
}

/// What [`create_kv_cache`] makes.
#[derive(Debug)]
#[non_exhaustive]
pub enum KvCaches {
    /// A cache for each layer, of one sequence or of equally long ones.
    Layers(Vec<Box<dyn Cache>>),
    /// For many sequences.
    Paged {
        /// Which sequence has which blocks.
        pool: Box<PagedPool>,
        /// The blocks of each layer.
        layers: Vec<PagedKv>,
    },
}

/// Makes the caches of a model, of one kind.
///
/// # Errors
/// When there is no layer, or the configuration says what the kind cannot be, under the name of the cache.
///
/// # Example
/// ```
/// use mlx_primitives::cache::{KvCacheConfig, KvCaches, create_kv_cache};
///
/// let config = KvCacheConfig { window: 1024, ..KvCacheConfig::new(2, 8, 64) };
/// let caches = create_kv_cache("rotating".parse()?, &config)?;
/// assert!(matches!(caches, KvCaches::Layers(layers) if layers.len() == 2));
///
/// let config = KvCacheConfig { max_bytes: 10_000_000, ..KvCacheConfig::new(2, 8, 64) };
/// let KvCaches::Paged { pool, .. } = create_kv_cache("paged".parse()?, &config)? else { return Ok(()) };
/// assert_eq!(pool.available_blocks(), 10_000_000 / (16 * 2 * 8 * 2 * 64 * 2) - 1);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn create_kv_cache(kind: KvCacheKind, config: &KvCacheConfig) -> Result<KvCaches> {
    CHECK.value(config.num_layers > 0, "num_layers", "be at least 1", config.num_layers)?;
    match kind {
        KvCacheKind::Simple => config.each(|| config.simple(KvForm::Plain)),
        KvCacheKind::Compressed => config.each(|| config.simple(KvForm::Int8)),
        KvCacheKind::Sliding => config.each(|| config.rotating(0)),
        KvCacheKind::Rotating => config.each(|| config.rotating(config.sinks)),
        KvCacheKind::Paged => config.paged(),
    }
}

//! Caches in files.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use mlx_rs::{Array, Dtype};

use super::{
    BatchKvCache, Cache, KvForm, RotatingKvCache, SimpleKvCache,
    store::{Forms, Store},
};
use crate::{check::Check, error::Result, ssm::RecurrentState};

const CHECK: Check = Check::op("load_caches");
const SAVING: Check = Check::op("save_caches");
const FORMAT: &str = "mlx-primitives caches 1";
/// The kind of a layer that holds a recurrent state.
const STATE: &str = "state";

/// All that a cache holds, in a form that goes into a file.
#[derive(Debug, Clone)]
pub struct Saved {
    facts: HashMap<String, String>,
    arrays: Vec<Array>,
}

/// Writes the caches of a model's layers into a safetensors file: the prompt that they hold need not be computed again.
///
/// `model` is whatever tells models apart, such as a name with a hash of the weights; loading asks for the same.
///
/// # Errors
/// When MLX cannot evaluate what they hold, or cannot write the file, whose name must end with `.safetensors`.
///
/// # Example
/// ```
/// use mlx_primitives::cache::{Cache, SimpleKvCache, load_caches, save_caches};
/// use mlx_rs::Array;
///
/// let token = Array::ones::<f32>(&[1, 5, 2, 64])?;
/// let mut cache = SimpleKvCache::new();
/// cache.update(&token, &token, Default::default())?;
///
/// let path = std::env::temp_dir().join("mlx-primitives-doc-of-save-caches.safetensors");
/// save_caches(&path, &[&cache], "a model")?;
/// let loaded = load_caches(&path, "a model")?;
/// assert_eq!((loaded.len(), loaded[0].len()), (1, 5));
/// assert!(load_caches(&path, "another model").is_err());
/// # std::fs::remove_file(path).ok();
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
pub fn save_caches(path: impl AsRef<Path>, caches: &[&dyn Cache], model: &str) -> Result<()> {
    let layers = caches.iter().map(|cache| cache.saved()).collect::<Result<_>>()?;
    save(path.as_ref(), layers, model)
}

/// Writes what all layers hold.
pub(super) fn save(path: &Path, layers: Vec<Saved>, model: &str) -> Result<()> {
    let mut arrays: Vec<(String, Array)> = Vec::new();
    let mut facts = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("model".to_owned(), model.to_owned()),
        ("layers".to_owned(), layers.len().to_string()),
    ]);
    // A file of no array is none to MLX.
    arrays.push(("format".to_owned(), Array::from_slice(&[1_i32], &[1])));
    for (layer, saved) in layers.into_iter().enumerate() {
        facts.extend(saved.facts.into_iter().map(|(name, fact)| (key(layer, &name), fact)));
        let named = saved.arrays.into_iter().enumerate();
        arrays.extend(named.map(|(index, array)| (key(layer, &index.to_string()), array)));
    }
    write(path, arrays, &facts)
}

/// Writes beside the file and then takes its place: arrays that were loaded from it, and are not read yet, stay what they
/// were, and so does the file if writing fails.
fn write(path: &Path, arrays: Vec<(String, Array)>, facts: &HashMap<String, String>) -> Result<()> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let aside = path.with_extension(format!("{}-{number}.safetensors", process::id()));
    let aside = if path.extension().is_some_and(|is| is == "safetensors") { &aside } else { path };
    let written = Array::save_safetensors(arrays, facts, aside).map_err(|error| error.to_string());
    let written = written
        .and_then(|()| fs::rename(aside, path).map_err(|error| error.to_string()))
        .map_err(|why| format!("{}: {why}", path.display()));
    if written.is_err() && aside != path {
        // What was not written need not be removed.
        let _ = fs::remove_file(aside);
    }
    let found = written.clone().err().unwrap_or_default();
    SAVING.known(written.ok(), "path", "be a safetensors file that can be written", found)
}

/// Reads what [`save_caches`] wrote for the same model.
///
/// # Errors
/// When there is no such file, it is not one of caches, it is of another model, or what it says does not fit together.
pub fn load_caches(path: impl AsRef<Path>, model: &str) -> Result<Vec<Box<dyn Cache>>> {
    load(path.as_ref(), model)?.iter().map(Saved::cache).collect()
}

/// Reads what all layers held.
pub(super) fn load(path: &Path, model: &str) -> Result<Vec<Saved>> {
    let read = Array::load_safetensors_with_metadata(path);
    let why = read.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let found = format!("{}: {why}", path.display());
    let (mut arrays, facts) = CHECK.known(read.ok(), "path", "be a safetensors file", found)?;
    let fact = |name: &str| facts.get(name).map_or("none", String::as_str);
    let known = fact("format") == FORMAT;
    CHECK.value(known, "format", format_args!("be {FORMAT:?}"), fact("format"))?;
    CHECK.value(fact("model") == model, "model", format_args!("be {model:?}"), fact("model"))?;
    let layers: Option<usize> = fact("layers").parse().ok();
    let layers = CHECK.known(layers, "layers", "be a number", fact("layers"))?;
    let mut saved = Vec::new();
    for layer in 0..layers {
        let prefix = key(layer, "");
        let own = facts.iter().filter_map(|(name, fact)| {
            Some((name.strip_prefix(&prefix)?.to_owned(), fact.clone()))
        });
        let own: HashMap<_, _> = own.collect();
        let expected = "be as many as the file has";
        CHECK.value(own.contains_key("kind"), "layers", expected, layers)?;
        let named = (0..).map_while(|index: usize| arrays.remove(&key(layer, &index.to_string())));
        saved.push(Saved { facts: own, arrays: named.collect() });
    }
    Ok(saved)
}

fn key(layer: usize, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

impl Saved {
    /// What a recurrent layer holds.
    pub(super) fn of_state(state: &impl RecurrentState) -> Self {
        let mut saved = Self { facts: HashMap::new(), arrays: state.arrays() };
        saved.set("kind", STATE);
        saved
    }

    /// The state that was saved, if it was one.
    pub(super) fn state<S: RecurrentState>(&self) -> Result<Option<S>> {
        if self.fact("kind") != STATE {
            return Ok(None);
        }
        let found = format_args!("{} of them", self.arrays.len());
        let state = S::from_arrays(self.arrays.clone());
        CHECK.known(state, "arrays", "be those of such a state", found).map(Some)
    }

    pub(super) fn new(kind: &str, forms: Forms, store: Option<&Store>) -> Self {
        let arrays = store.map_or_else(Vec::new, |store| store.arrays().cloned().collect());
        let mut saved = Self { facts: HashMap::new(), arrays };
        saved.set("kind", kind);
        saved.set("keys", forms.keys.name());
        saved.set("values", forms.values.name());
        if let Some(store) = store {
            let (dtype, [size, value_size]) = store.numbers();
            saved.set("dtype", format!("{dtype:?}"));
            saved.set("key_size", size);
            saved.set("value_size", value_size);
        }
        saved
    }

    pub(super) fn set(&mut self, name: &str, fact: impl ToString) {
        self.facts.insert(name.to_owned(), fact.to_string());
    }

    pub(super) fn set_optional(&mut self, name: &str, fact: Option<i32>) {
        if let Some(fact) = fact {
            self.set(name, fact);
        }
    }

    fn fact(&self, name: &str) -> &str {
        self.facts.get(name).map_or("none", String::as_str)
    }

    /// A whole number.
    pub(super) fn number(&self, name: &'static str) -> Result<i32> {
        CHECK.known(self.fact(name).parse().ok(), name, "be a number", self.fact(name))
    }

    /// A whole number, if there is one.
    pub(super) fn optional(&self, name: &'static str) -> Result<Option<i32>> {
        self.facts.contains_key(name).then(|| self.number(name)).transpose()
    }

    /// Whole numbers.
    pub(super) fn numbers(&self, name: &'static str) -> Result<Vec<i32>> {
        let numbers = self.fact(name).split_whitespace().map(|number| number.parse().ok());
        CHECK.known(numbers.collect(), name, "be numbers", self.fact(name))
    }

    pub(super) fn forms(&self) -> Result<Forms> {
        let form =
            |name| CHECK.known(KvForm::named(self.fact(name)), name, "be a form", self.fact(name));
        Ok(Forms { keys: form("keys")?, values: form("values")? })
    }

    /// The arrays, if they are those of a store; `None` if there are none.
    pub(super) fn store(&self) -> Result<Option<Store>> {
        if self.arrays.is_empty() {
            return Ok(None);
        }
        let dtypes = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];
        let dtype = dtypes.into_iter().find(|dtype| format!("{dtype:?}") == self.fact("dtype"));
        let dtype = CHECK.known(dtype, "dtype", "be one of tokens", self.fact("dtype"))?;
        let sizes = [self.number("key_size")?, self.number("value_size")?];
        let forms = self.forms()?;
        forms.keys.check(CHECK, "key_size", sizes[0])?;
        forms.values.check(CHECK, "value_size", sizes[1])?;
        let positive = sizes.into_iter().all(|size| size >= 0);
        CHECK.value(positive, "key_size", "be a size, as value_size", format_args!("{sizes:?}"))?;
        let store = Store::from_arrays(forms, &self.arrays, (dtype, sizes))?;
        let found = self.arrays.iter().map(|array| format!("{:?}", array.shape()));
        let found = found.collect::<Vec<_>>().join(", ");
        CHECK.known(store, "arrays", "be those of keys and values", found).map(Some)
    }

    pub(super) fn check(
        &self,
        holds: bool,
        name: &'static str,
        expected: &str,
        found: i32,
    ) -> Result<()> {
        CHECK.value(holds, name, expected, found)
    }

    /// The cache that was saved.
    pub(super) fn cache(&self) -> Result<Box<dyn Cache>> {
        Ok(match self.fact("kind") {
            SimpleKvCache::KIND => Box::new(SimpleKvCache::restore(self)?),
            RotatingKvCache::KIND => Box::new(RotatingKvCache::restore(self)?),
            BatchKvCache::KIND => Box::new(BatchKvCache::restore(self)?),
            other => CHECK.known(None, "kind", "be one of this release", other)?,
        })
    }
}

//! The caches of a model's layers, of which some remember a state and not tokens.

use std::{fmt::Debug, path::Path};

use mlx_rs::Array;

use super::{
    Cache,
    file::{self, Saved},
};
use crate::{check::Check, error::Result, ssm::RecurrentState};

const CHECK: Check = Check::op("LayerCaches");

/// What one layer remembers.
#[derive(Debug)]
pub enum LayerCache<S> {
    /// Of attention: tokens, of which the last can be taken back.
    Attention(Box<dyn Cache>),
    /// Of a recurrence, such as [`MambaState`](crate::ssm::MambaState): all tokens in a few arrays, none of which can be
    /// taken out again.
    State(S),
}

/// What all layers of a model remember, with a way back for those that cannot take tokens back.
///
/// A recurrent state knows no trimming, so it is kept whole where one may have to return: before tokens that are only
/// guessed, or where a prompt ends that others share. Arrays are shared with what goes on, and cost nothing until then.
///
/// # Example
/// ```
/// use mlx_primitives::{attention::{FlashAttentionOptions, KvCache}, ssm::MambaState};
/// use mlx_primitives::cache::{Cache, LayerCache, LayerCaches, SimpleKvCache};
/// use mlx_rs::Array;
///
/// let attention = LayerCache::Attention(Box::new(SimpleKvCache::new()));
/// let mut caches = LayerCaches::new(vec![attention, LayerCache::State(MambaState::default())]);
/// let checkpoint = caches.checkpoint();
///
/// let guess = Array::ones::<f32>(&[1, 3, 2, 8])?;
/// if let LayerCache::Attention(cache) = &mut caches.layers[0] {
///     cache.attend(&guess, &guess, &guess, FlashAttentionOptions::default())?;
/// }
/// caches.rollback(&checkpoint)?;
/// assert!(matches!(&caches.layers[0], LayerCache::Attention(cache) if cache.is_empty()));
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
#[derive(Debug)]
pub struct LayerCaches<S> {
    /// In the order of the layers.
    pub layers: Vec<LayerCache<S>>,
}

impl<S: RecurrentState> LayerCaches<S> {
    /// The size of all arrays, in bytes.
    pub fn nbytes(&self) -> usize {
        let of = |layer: &LayerCache<S>| match layer {
            LayerCache::Attention(cache) => cache.nbytes(),
            LayerCache::State(state) => state.arrays().iter().map(Array::nbytes).sum(),
        };
        self.layers.iter().map(of).sum()
    }

    /// Writes all of it into a safetensors file, as [`save_caches`](super::save_caches) does.
    ///
    /// # Errors
    /// As for [`save_caches`](super::save_caches).
    pub fn save(&self, path: impl AsRef<Path>, model: &str) -> Result<()> {
        let saved = |layer: &LayerCache<S>| match layer {
            LayerCache::Attention(cache) => cache.saved(),
            LayerCache::State(state) => Ok(Saved::of_state(state)),
        };
        let layers = self.layers.iter().map(saved).collect::<Result<_>>()?;
        file::save(path.as_ref(), layers, model)
    }

    /// Reads what [`Self::save`] wrote for the same model and states of the same kind.
    ///
    /// # Errors
    /// As for [`load_caches`](super::load_caches), and when a state is of another kind.
    pub fn load(path: impl AsRef<Path>, model: &str) -> Result<Self> {
        let layer = |saved: &Saved| match saved.state()? {
            Some(state) => Ok(LayerCache::State(state)),
            None => Ok(LayerCache::Attention(saved.cache()?)),
        };
        let layers = file::load(path.as_ref(), model)?;
        Ok(Self { layers: layers.iter().map(layer).collect::<Result<_>>()? })
    }
}

/// A place in a text to which [`LayerCaches`] can return, as long as they were not led back before it.
#[derive(Debug, Clone)]
pub struct Checkpoint<S> {
    layers: Vec<Mark<S>>,
}

#[derive(Debug, Clone)]
enum Mark<S> {
    Len(i32),
    State(S),
}

impl<S: Clone + Debug> LayerCaches<S> {
    /// Those of these layers.
    pub fn new(layers: Vec<LayerCache<S>>) -> Self {
        Self { layers }
    }

    /// The place where all layers are now.
    pub fn checkpoint(&self) -> Checkpoint<S> {
        let mark = |layer: &LayerCache<S>| match layer {
            LayerCache::Attention(cache) => Mark::Len(cache.len()),
            LayerCache::State(state) => Mark::State(state.clone()),
        };
        Checkpoint { layers: self.layers.iter().map(mark).collect() }
    }

    /// Whether all layers can return to a place.
    pub fn can_roll_back(&self, checkpoint: &Checkpoint<S>) -> bool {
        self.check(checkpoint).is_ok()
    }

    /// Returns to a place, as if nothing had been appended since. The place stays valid.
    ///
    /// # Errors
    /// When it is one of other layers, or a cache has let go of what it would have to take up again, or holds less. Nothing
    /// is changed then.
    pub fn rollback(&mut self, checkpoint: &Checkpoint<S>) -> Result<()> {
        self.check(checkpoint)?;
        for (layer, mark) in self.layers.iter_mut().zip(&checkpoint.layers) {
            match (layer, mark) {
                (LayerCache::Attention(cache), Mark::Len(len)) => cache.trim(cache.len() - len)?,
                (LayerCache::State(state), Mark::State(kept)) => state.clone_from(kept),
                _ => {}
            }
        }
        Ok(())
    }

    /// A second list that holds the same and goes on by itself.
    ///
    /// # Errors
    /// When a cache cannot be forked.
    pub fn fork(&self) -> Result<Self> {
        let fork = |layer: &LayerCache<S>| {
            Ok(match layer {
                LayerCache::Attention(cache) => LayerCache::Attention(cache.fork()?),
                LayerCache::State(state) => LayerCache::State(state.clone()),
            })
        };
        Ok(Self { layers: self.layers.iter().map(fork).collect::<Result<_>>()? })
    }

    /// Refuses a place to which not every layer can return.
    fn check(&self, checkpoint: &Checkpoint<S>) -> Result<()> {
        let (own, theirs) = (self.layers.len(), checkpoint.layers.len());
        CHECK.value(own == theirs, "checkpoint", format_args!("be one of {own} layers"), theirs)?;
        for (index, (layer, mark)) in self.layers.iter().zip(&checkpoint.layers).enumerate() {
            let (fits, found) = match (layer, mark) {
                (LayerCache::Attention(cache), &Mark::Len(len)) => {
                    (cache.can_trim(cache.len() - len), format!("position {len}"))
                }
                (LayerCache::State(_), Mark::State(_)) => (true, String::new()),
                _ => (false, "a layer of another kind".to_owned()),
            };
            let expected = format_args!("be within reach of layer {index}");
            CHECK.value(fits, "checkpoint", expected, found)?;
        }
        Ok(())
    }
}

//! What recurrent layers remember, as arrays.

use std::fmt::Debug;

use mlx_rs::Array;

use super::{DiagonalState, H3State, MambaState};

/// What a recurrent layer remembers of the steps so far: a few arrays, or none before the first step.
pub trait RecurrentState: Clone + Debug {
    /// All that it holds.
    fn arrays(&self) -> Vec<Array>;

    /// The state that held these; `None` if none does.
    fn from_arrays(arrays: Vec<Array>) -> Option<Self>;
}

impl RecurrentState for MambaState {
    fn arrays(&self) -> Vec<Array> {
        self.parts.iter().flatten().cloned().collect()
    }

    fn from_arrays(arrays: Vec<Array>) -> Option<Self> {
        match arrays.is_empty() {
            true => Some(Self::default()),
            false => Some(Self { parts: Some(arrays.try_into().ok()?) }),
        }
    }
}

/// That of an [`S4`](super::S4).
impl RecurrentState for Option<DiagonalState> {
    fn arrays(&self) -> Vec<Array> {
        self.iter().flat_map(|state| [state.real.clone(), state.imaginary.clone()]).collect()
    }

    fn from_arrays(arrays: Vec<Array>) -> Option<Self> {
        if arrays.is_empty() {
            return Some(None);
        }
        let [real, imaginary] = arrays.try_into().ok()?;
        Some(Some(DiagonalState { real, imaginary }))
    }
}

impl RecurrentState for H3State {
    fn arrays(&self) -> Vec<Array> {
        let arrays = self.parts.iter().flat_map(|(keys, DiagonalState { real, imaginary })| {
            [keys.clone(), real.clone(), imaginary.clone()]
        });
        arrays.collect()
    }

    fn from_arrays(arrays: Vec<Array>) -> Option<Self> {
        if arrays.is_empty() {
            return Some(Self::default());
        }
        let [keys, real, imaginary] = arrays.try_into().ok()?;
        Some(Self { parts: Some((keys, DiagonalState { real, imaginary })) })
    }
}

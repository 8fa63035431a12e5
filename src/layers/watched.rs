//! A projection whose changes are noticed.

use std::{
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicU64, Ordering},
};

use mlx_rs::{Array, error::Exception, module::Module, nn};

use super::{Projection, parameters_of_inner};
use crate::quant::QuantizedLinear;

/// A [`Projection`] in a layer that may be prepared for inference, and must know when that is stale.
///
/// It dereferences to the projection, is made of one by `into`, and has its parameters. Whoever borrows it for writing, be it
/// through [`DerefMut`] or [`parameters_mut`](mlx_rs::module::ModuleParameters::parameters_mut), is taken to have changed it;
/// to compute with it and to freeze it changes nothing.
#[derive(Debug, Clone)]
pub struct WatchedProjection {
    projection: Projection,
    version: Version,
}

/// Which state of a projection this is, of all there ever were of any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version(u64);

impl Version {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl WatchedProjection {
    pub(super) fn version(&self) -> Version {
        self.version
    }

    fn inner(&self) -> &Projection {
        self
    }

    /// For those who leave what it computes as it was.
    pub(super) fn inner_mut(&mut self) -> &mut Projection {
        &mut self.projection
    }

    fn lent(&mut self) -> &mut Projection {
        self
    }
}

parameters_of_inner!(WatchedProjection, lent);

impl Module<&Array> for WatchedProjection {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        self.projection.forward(x)
    }

    fn training_mode(&mut self, mode: bool) {
        self.projection.training_mode(mode);
    }
}

impl Deref for WatchedProjection {
    type Target = Projection;

    fn deref(&self) -> &Projection {
        &self.projection
    }
}

impl DerefMut for WatchedProjection {
    fn deref_mut(&mut self) -> &mut Projection {
        self.version = Version::next();
        &mut self.projection
    }
}

impl From<Projection> for WatchedProjection {
    fn from(projection: Projection) -> Self {
        Self { projection, version: Version::next() }
    }
}

impl From<WatchedProjection> for Projection {
    fn from(watched: WatchedProjection) -> Self {
        watched.projection
    }
}

impl From<nn::Linear> for WatchedProjection {
    fn from(linear: nn::Linear) -> Self {
        Projection::from(linear).into()
    }
}

impl From<QuantizedLinear> for WatchedProjection {
    fn from(linear: QuantizedLinear) -> Self {
        Projection::from(linear).into()
    }
}

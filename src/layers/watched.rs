//! A projection whose changes are noticed.

use std::{
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicU64, Ordering},
};

use mlx_rs::{Array, error::Exception, module::Module, nn};

use super::{Projection, parameters_of_inner};
use crate::quant::QuantizedLinear;

/// A [`Projection`] of a layer that may multiply by several as by one, and must know when one of them has changed.
///
/// It reads, writes and is assigned like the projection in it. Whoever borrows it for writing, as
/// [`parameters_mut`](mlx_rs::module::ModuleParameters::parameters_mut) does, is taken to have changed it.
#[derive(Debug, Clone)]
pub struct Watched {
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

impl Watched {
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// The projection, for those who leave what it computes as it was.
    pub(super) fn unchanged(&mut self) -> &mut Projection {
        &mut self.projection
    }

    pub(super) fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        self.projection.forward(x)
    }

    fn inner(&self) -> &Projection {
        self
    }

    fn inner_mut(&mut self) -> &mut Projection {
        self
    }
}

parameters_of_inner!(Watched);

impl Deref for Watched {
    type Target = Projection;

    fn deref(&self) -> &Projection {
        &self.projection
    }
}

impl DerefMut for Watched {
    fn deref_mut(&mut self) -> &mut Projection {
        self.version = Version::next();
        &mut self.projection
    }
}

impl From<Projection> for Watched {
    fn from(projection: Projection) -> Self {
        Self { projection, version: Version::next() }
    }
}

impl From<nn::Linear> for Watched {
    fn from(linear: nn::Linear) -> Self {
        Projection::from(linear).into()
    }
}

impl From<QuantizedLinear> for Watched {
    fn from(linear: QuantizedLinear) -> Self {
        Projection::from(linear).into()
    }
}

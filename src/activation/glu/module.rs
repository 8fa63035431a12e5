//! The layer behind one projection of doubled width.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{GluOptions, glu};
use crate::{
    activation::{Activation, pointwise},
    check::Check,
    dispatch::{Context, Dispatch},
    error::Result,
};

/// [`glu`](glu()) of the two halves of the last axis; it has no parameters.
///
/// The first half is the gate and the second is scaled by it. Weights fused in the other order must
/// have their halves swapped when they are loaded.
///
/// # Shapes
/// `[..., 2F]` to `[..., F]`.
///
/// # Errors
/// When the last axis is empty or odd, or as [`glu`](glu()).
///
/// # Example
/// ```
/// use mlx_primitives::activation::{Activation, Glu};
/// use mlx_rs::{Array, module::Module};
///
/// let mut glu = Glu::new(Activation::Silu);
/// let y = glu.forward(&Array::ones::<f32>(&[2, 10, 64])?)?;
/// assert_eq!(y.shape(), [2, 10, 32]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct Glu {
    /// What the gate goes through.
    pub activation: Activation,
}

impl Glu {
    /// A gate with that activation.
    pub const fn new(activation: Activation) -> Self {
        Self { activation }
    }
}

impl Module<&Array> for Glu {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let check = Check::op("Glu");
        let width = check.last_axis("x", x)?;
        check.value(width % 2 == 0, "x", "have an even last axis", width)?;
        let halves = x.split_equal(2, -1)?;
        // Not a kernel, which would copy the halves.
        let dispatch = Dispatch::Only(pointwise::choose(&Context::current()?));
        let options = GluOptions { activation: self.activation, dispatch, ..Default::default() };
        Ok(glu(&halves[0], &halves[1], options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}

//! Swish with a slope of its own.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, Param, Parameter},
    ops::sigmoid,
};

use crate::{
    builder::builder,
    check::{Check, axes},
    error::Result,
    uploads,
};

/// Scales each element by the sigmoid of `beta` times itself.
///
/// `y = x · σ(beta · x)`, in f32 whatever the dtype. With a `beta` of one it is
/// [`silu`](super::silu), which is faster.
///
/// # Shapes
/// `x`: any, f32, f16 or bf16; the result has its shape and dtype.
///
/// # Errors
/// When `x` is not floating point, or when `beta` is not finite.
///
/// # Example
/// ```
/// use mlx_primitives::activation::swish;
/// use mlx_rs::array;
///
/// let y = swish(array!([1.0]), 2.0)?;
/// assert!(y.all_close(array!([0.880_797]), None, None, None)?);
/// # Ok::<(), mlx_primitives::Error>(())
/// ```
///
/// # Backends
/// Plain ops.
///
/// Ramachandran, Zoph and Le, [Searching for Activation Functions](https://arxiv.org/abs/1710.05941),
/// 2017.
pub fn swish(x: impl AsRef<Array>, beta: f32) -> Result<Array> {
    Check::op("swish").finite("beta", beta)?;
    sloped(x.as_ref(), &uploads::float(beta))
}

fn sloped(x: &Array, beta: &Array) -> Result<Array> {
    let check = Check::op("swish");
    let dtype = check.floating("x", x)?;
    check.floating("beta", beta)?;
    check.shape("beta", beta, axes![])?;
    let x = x.as_dtype(Dtype::Float32)?;
    let gate = sigmoid(x.multiply(beta.as_dtype(Dtype::Float32)?)?)?;
    Ok(x.multiply(gate)?.as_dtype(dtype)?)
}

builder! {
    /// Builder for [`Swish`].
    SwishBuilder => Swish (
        /// The slope, or its first value.
        beta: f32,
    ) {
        /// Whether the slope trains; `false` by default, which freezes it.
        learnable: bool = false,
    }
}

/// [`swish`] with a slope that may be trained.
///
/// # Shapes
/// Any, to the same.
///
/// # Example
/// ```
/// use mlx_primitives::activation::SwishBuilder;
/// use mlx_rs::{array, builder::Builder, module::Module};
///
/// let mut swish = SwishBuilder::new(1.5).learnable(true).build()?;
/// assert_eq!(swish.forward(&array!([1.0, 2.0]))?.shape(), [2]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct Swish {
    /// `[]`: the slope, frozen unless learnable.
    #[param]
    pub beta: Param<Array>,
}

impl Swish {
    /// A slope that does not train.
    ///
    /// # Errors
    /// When `beta` is not finite.
    pub fn new(beta: f32) -> Result<Self> {
        Self::assemble(SwishBuilder::new(beta))
    }

    fn assemble(builder: SwishBuilder) -> Result<Self> {
        Check::op("Swish").finite("beta", builder.beta)?;
        let mut beta = Param::new(uploads::float(builder.beta));
        if !builder.learnable {
            beta.freeze(true);
        }
        Ok(Self { beta })
    }
}

impl Module<&Array> for Swish {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        Ok(sloped(x, &self.beta)?)
    }

    fn training_mode(&mut self, _: bool) {}
}

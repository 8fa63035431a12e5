//! Activations, and the gates built on them.
//!
//! [`Activation`] names one, parses the names that model files use, and is a module; each also has
//! a function, such as [`silu`]. [`glu`](glu()) gates one array by the activation of another, and
//! [`softmax`](softmax()) turns rows into weights.

pub(crate) mod fused;
pub mod glu;
pub mod pointwise;
pub(crate) mod softmax;
mod swish;

pub use glu::{Glu, GluOptions, geglu, geglu_tanh, glu, reglu, swiglu};
pub use pointwise::{
    Activation, gelu, gelu_tanh, hard_sigmoid, hard_swish, leaky_relu, mish, quick_gelu, relu,
    relu_squared, relu6, sigmoid, silu, softplus, tanh,
};
pub use softmax::{SoftmaxOptions, softmax};
pub use swish::{Swish, SwishBuilder, swish};

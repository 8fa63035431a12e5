//! Activations.
//!
//! [`Activation`] names one, parses the names that model files use, and is a module; each also has
//! a function, such as [`silu`].

mod fused;
pub mod pointwise;

pub use pointwise::{
    Activation, gelu, gelu_tanh, hard_sigmoid, hard_swish, leaky_relu, mish, quick_gelu, relu,
    relu_squared, relu6, sigmoid, silu, softplus, tanh,
};

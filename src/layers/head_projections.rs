//! The projections of attention from a sequence to itself.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::Projection;
use crate::{
    check::{Check, axes},
    error::Result,
};

/// What makes queries, keys and values of a sequence, and a sequence of the heads.
///
/// The attention layers that are not softmax over all keys hold it, and have its parameters under its names.
#[derive(Debug, Clone, ModuleParameters)]
pub struct HeadProjections {
    /// `[H · D, dims]`.
    #[param]
    pub query: Projection,
    /// `[H_kv · D, dims]`.
    #[param]
    pub key: Projection,
    /// `[H_kv · D, dims]`.
    #[param]
    pub value: Projection,
    /// `[dims, H · D]`.
    #[param]
    pub output: Projection,
    pub(super) sizes: HeadSizes,
}

/// `dims` and how it is divided.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadSizes {
    pub(super) dims: i32,
    pub(super) num_kv_heads: i32,
    pub(super) head_dim: i32,
}

impl HeadSizes {
    pub(super) fn new(
        check: Check,
        dims: i32,
        num_heads: i32,
        num_kv_heads: Option<i32>,
    ) -> Result<Self> {
        check.at_least("dims", dims, 1)?;
        check.at_least("num_heads", num_heads, 1)?;
        let divides = dims % num_heads == 0;
        check.value(divides, "num_heads", format_args!("divide {dims}"), num_heads)?;
        let num_kv_heads = num_kv_heads.unwrap_or(num_heads);
        check.at_least("num_kv_heads", num_kv_heads, 1)?;
        let divides = num_heads % num_kv_heads == 0;
        check.value(divides, "num_kv_heads", format_args!("divide {num_heads}"), num_kv_heads)?;
        Ok(Self { dims, num_kv_heads, head_dim: dims / num_heads })
    }

    fn kv_dims(self) -> i32 {
        self.num_kv_heads * self.head_dim
    }

    /// To `[B, S, H · D]`.
    pub(super) fn to_queries(self, bias: bool) -> Result<Projection> {
        Projection::random(self.dims, self.dims, bias)
    }

    /// To `[B, S, H_kv · D]`.
    pub(super) fn to_keys(self, bias: bool) -> Result<Projection> {
        Projection::random(self.dims, self.kv_dims(), bias)
    }

    /// `[B, S, heads · D]` as `[B, S, heads, D]`.
    pub(super) fn split(self, x: Array) -> Result<Array> {
        Ok(x.reshape(&[x.dim(0), x.dim(1), x.dim(2) / self.head_dim, self.head_dim])?)
    }

    pub(super) fn check(self, check: Check, x: &Array) -> Result<()> {
        check.floating("x", x)?;
        check.shape("x", x, axes!["B", "S", self.dims])
    }
}

impl HeadProjections {
    /// Random ones; `bias` is that of queries, keys and values.
    pub(super) fn new(sizes: HeadSizes, bias: bool) -> Result<Self> {
        Ok(Self {
            query: sizes.to_queries(bias)?,
            key: sizes.to_keys(bias)?,
            value: sizes.to_keys(bias)?,
            output: sizes.to_queries(false)?,
            sizes,
        })
    }

    /// Queries, keys and values of `[B, S, dims]`, `[B, S, heads, D]` each.
    pub(super) fn split(&mut self, check: Check, x: &Array) -> Result<[Array; 3]> {
        self.sizes.check(check, x)?;
        Ok([
            self.sizes.split(self.query.forward(x)?)?,
            self.sizes.split(self.key.forward(x)?)?,
            self.sizes.split(self.value.forward(x)?)?,
        ])
    }

    /// `[B, S, H, D]` to `[B, S, dims]`.
    pub(super) fn merge(&mut self, heads: &Array) -> Result<Array, Exception> {
        let (batch, tokens) = (heads.dim(0), heads.dim(1));
        self.output.forward(&heads.reshape(&[batch, tokens, self.sizes.dims])?)
    }

    pub(super) fn set_training_mode(&mut self, mode: bool) {
        for projection in [&mut self.query, &mut self.key, &mut self.value, &mut self.output] {
            projection.training_mode(mode);
        }
    }
}

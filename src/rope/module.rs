//! The layer: frequencies and [`rope`].

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{RopeOffset, RopeOptions, RopeScaling, RopeStyle, rope, rope_qk};
use crate::{builder::builder, check::Check, error::Result, layout::Layout};

builder! {
    /// Builder for [`Rope`].
    RopeBuilder => Rope (
        /// How many leading elements of a head are rotated; the others pass through.
        dims: i32,
    ) {
        /// Which two elements are rotated together.
        style: RopeStyle = RopeStyle::default(),
        /// Pair `i` is rotated by `base^(-2i/dims)` a position; [`RopeOptions::DEFAULT_BASE`] by default.
        base: f32 = RopeOptions::DEFAULT_BASE,
        /// How the frequencies are changed for long sequences.
        scaling: RopeScaling = RopeScaling::None,
        /// The length that the frequencies of [`RopeScaling::DynamicNtk`] and
        /// [`RopeScaling::LongRope`] are for; by default that of each call, its offset included.
        sequence_length: Option<i32> = None,
        /// The order of the axes of the input.
        layout: Layout = Layout::default(),
    }
}

/// [`rope`] with frequencies made once, when the layer is built. It has no parameters.
///
/// [`RopeScaling::DynamicNtk`] and [`RopeScaling::LongRope`] depend on the length of the sequence.
/// Unless [`RopeBuilder::sequence_length`] fixes it, they are made anew for each call, as their
/// authors did; keys that were rotated for a shorter sequence, and cached, then do not match queries
/// rotated for a longer one.
///
/// # Shapes
/// `[B, S, H, D]` to the same, or `[B, H, S, D]` with [`Layout::Bhsd`].
///
/// # Example
/// ```
/// use mlx_primitives::rope::{RopeBuilder, RopeScaling};
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let scaling = RopeScaling::Llama3 {
///     factor: 8.0,
///     low_freq_factor: 1.0,
///     high_freq_factor: 4.0,
///     original_max_positions: 8192,
/// };
/// let mut rope = RopeBuilder::new(64).base(500_000.0).scaling(scaling).build()?;
/// let queries = Array::ones::<f32>(&[1, 10, 4, 64])?;
/// let keys = Array::ones::<f32>(&[1, 10, 1, 64])?;
/// let (queries, keys) = rope.rotate(&queries, &keys, 100)?;
/// assert_eq!(queries.shape(), [1, 10, 4, 64]);
///
/// // As a layer: at position 0, or from a position on.
/// rope.forward(&keys)?;
/// rope.forward((&keys, 100))?;
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct Rope {
    dims: i32,
    base: f32,
    scaling: RopeScaling,
    follows_length: bool,
    options: RopeOptions,
}

impl Rope {
    /// A rotation of the first `dims` elements of each head, with the default base.
    ///
    /// # Errors
    /// When `dims` is odd or below two.
    pub fn new(dims: i32) -> Result<Self> {
        Self::assemble(RopeBuilder::new(dims))
    }

    /// How many leading elements of a head are rotated.
    pub fn dims(&self) -> i32 {
        self.dims
    }

    fn assemble(builder: RopeBuilder) -> Result<Self> {
        let RopeBuilder { dims, style, base, scaling, sequence_length, layout } = builder;
        if let Some(length) = sequence_length {
            Check::op("Rope").at_least("sequence_length", length, 1)?;
        }
        let frequencies = scaling.frequencies(dims, base, sequence_length.unwrap_or(1))?;
        let options = RopeOptions {
            dims: Some(dims),
            style,
            base,
            frequencies: Some(frequencies),
            layout,
            ..Default::default()
        };
        let follows_length = sequence_length.is_none() && scaling.follows_length();
        Ok(Self { dims, base, scaling, follows_length, options })
    }

    /// Rotates `x`, whose sequence starts at `offset`.
    ///
    /// # Errors
    /// Those of [`rope`], and an `offset` for each row under frequencies that follow the length of
    /// the sequence, which the host then does not know.
    pub fn forward_at<'a>(&self, x: &Array, offset: impl Into<RopeOffset<'a>>) -> Result<Array> {
        self.rotate_one(self.options.layout, x, offset.into())
    }

    /// [`Self::forward_at`] for an array of this layout, whatever the layer's own.
    pub(crate) fn rotate_one(
        &self,
        layout: Layout,
        x: &Array,
        offset: RopeOffset,
    ) -> Result<Array> {
        rope(x, offset, self.options_for(layout, x, offset)?)
    }

    /// Rotates queries and keys of the same positions, whatever the number of heads of each, as [`rope_qk`] does.
    ///
    /// # Errors
    /// Those of [`rope_qk`], and as for [`Self::forward_at`].
    pub fn rotate<'a>(
        &self,
        queries: &Array,
        keys: &Array,
        offset: impl Into<RopeOffset<'a>>,
    ) -> Result<(Array, Array)> {
        self.rotate_in(self.options.layout, queries, keys, offset.into())
    }

    /// [`Self::rotate`] for arrays of this layout, whatever the layer's own.
    pub(crate) fn rotate_in(
        &self,
        layout: Layout,
        queries: &Array,
        keys: &Array,
        offset: RopeOffset,
    ) -> Result<(Array, Array)> {
        rope_qk(queries, keys, offset, self.options_for(layout, queries, offset)?)
    }

    /// The options of a call on `x`, or on arrays of as many steps.
    pub(crate) fn options_for(
        &self,
        layout: Layout,
        x: &Array,
        offset: RopeOffset,
    ) -> Result<RopeOptions> {
        let mut options = RopeOptions { layout, ..self.options.clone() };
        if self.follows_length {
            let length = self.length_of(x, offset, layout)?;
            options.frequencies = Some(self.scaling.frequencies(self.dims, self.base, length)?);
        }
        Ok(options)
    }

    /// The length of a sequence that ends with `x`; without a sequence axis, [`rope`] refuses `x`.
    fn length_of(&self, x: &Array, offset: RopeOffset, layout: Layout) -> Result<i32> {
        let axis = layout.sequence_axis() as usize;
        let length = x.shape().get(axis).copied().unwrap_or_default();
        match offset {
            RopeOffset::At(first) => Ok(first.saturating_add(length)),
            RopeOffset::PerRow(_) => {
                let expected = "be one number unless sequence_length is set";
                Check::op("Rope").value(false, "offset", expected, "one for each row")?;
                Ok(length)
            }
        }
    }
}

/// Input of [`Rope`].
#[derive(Debug, Clone, Copy)]
pub struct RopeInput<'a> {
    /// Queries or keys.
    pub x: &'a Array,
    /// The position where each row starts.
    pub offset: RopeOffset<'a>,
}

impl<'a> From<&'a Array> for RopeInput<'a> {
    fn from(x: &'a Array) -> Self {
        (x, 0).into()
    }
}

impl<'a, O: Into<RopeOffset<'a>>> From<(&'a Array, O)> for RopeInput<'a> {
    fn from((x, offset): (&'a Array, O)) -> Self {
        Self { x, offset: offset.into() }
    }
}

impl<'a, I: Into<RopeInput<'a>>> Module<I> for Rope {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let RopeInput { x, offset } = input.into();
        Ok(self.forward_at(x, offset)?)
    }

    fn training_mode(&mut self, _: bool) {}
}

//! Blocks of Mamba, one after another.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module, nn};

use super::{
    Mamba2Block, Mamba2BlockBuilder, MambaBlock, MambaBlockBuilder, MambaInput, MambaKind,
    MambaMixer, MambaState,
};
use crate::{
    builder::builder,
    check::{Axis, Check, axes},
    error::Result,
    layers::TokenEmbedding,
    norm::{RmsNorm, RmsNormBuilder},
};

const CHECK: Check = Check::op("Mamba");

builder! {
    /// Builder for [`Mamba`].
    MambaBuilder => Mamba (
        /// The size of the last axis between layers.
        dims: i32,
        /// How many layers.
        n_layers: i32,
    ) {
        /// Which blocks; those of Mamba, the first, by default.
        kind: MambaKind = MambaKind::default(),
        /// See [`MambaBlockBuilder::d_state`] and [`Mamba2BlockBuilder::d_state`]; the block's own default by default.
        d_state: Option<i32> = None,
        /// See [`MambaBlockBuilder::d_conv`].
        d_conv: i32 = MambaBlock::DEFAULT_D_CONV,
        /// See [`MambaBlockBuilder::expand`].
        expand: i32 = MambaBlock::DEFAULT_EXPAND,
        /// Tokens to embed, and to predict with the same table, `V`; without, the model maps vectors to vectors.
        vocab_size: Option<i32> = None,
        /// Added to the mean square in norms; [`RmsNorm::DEFAULT_EPS`] by default.
        norm_eps: f32 = RmsNorm::DEFAULT_EPS,
    }
}

/// A residual stack of [`MambaBlock`]s or [`Mamba2Block`]s, each after a norm: `x + mixer(norm(x))`.
///
/// Its parameters are named as in `mamba_ssm`, whose head is the embedding.
///
/// # Shapes
/// Integer ids `[B, L]` to logits `[B, L, V]`, or without a vocabulary `[B, L, dims]` to `[B, L, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::ssm::MambaBuilder;
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let mut model = MambaBuilder::new(32, 2).vocab_size(100).build()?;
/// let mut states = model.states();
/// let prompt = Array::from_slice(&[1, 2, 3], &[1, 3]);
/// let logits = model.forward_with(&prompt, &mut states)?;
/// let next = model.step(Array::from_slice(&[4], &[1]), &mut states)?;
/// assert_eq!((logits.shape(), next.shape()), (&[1, 3, 100][..], &[1, 100][..]));
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
///
/// Gu and Dao, [Mamba: Linear-Time Sequence Modeling with Selective State Spaces](https://arxiv.org/abs/2312.00752),
/// 2023.
#[derive(Debug, Clone, ModuleParameters)]
pub struct Mamba {
    /// All of it.
    #[param]
    pub backbone: MambaBackbone,
}

/// The parts of a [`Mamba`].
#[derive(Debug, Clone, ModuleParameters)]
pub struct MambaBackbone {
    /// Of tokens, and of their logits.
    #[param]
    pub embedding: Option<TokenEmbedding>,
    /// In order.
    #[param]
    pub layers: Vec<MambaLayer>,
    /// After the last layer.
    #[param]
    pub norm_f: RmsNorm,
}

/// `x + mixer(norm(x))`.
///
/// # Shapes
/// `[B, L, dims]` to `[B, L, dims]`.
#[derive(Debug, Clone, ModuleParameters)]
pub struct MambaLayer {
    /// Before the mixer.
    #[param]
    pub norm: RmsNorm,
    /// What steps see of each other.
    #[param]
    pub mixer: MambaMixer,
}

impl MambaLayer {
    /// [`MambaMixer::step`] between norm and residual.
    ///
    /// # Errors
    /// Those of [`MambaMixer::step`].
    pub fn step(&mut self, x: impl AsRef<Array>, state: &mut MambaState) -> Result<Array> {
        let x = x.as_ref();
        let normed = self.norm.forward(x)?;
        Ok(x.add(self.mixer.step(&normed, state)?)?)
    }
}

impl<'a, I: Into<MambaInput<'a>>> Module<I> for MambaLayer {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let MambaInput { x, state } = input.into();
        let normed = self.norm.forward(x)?;
        x.add(self.mixer.forward(MambaInput { x: &normed, state })?)
    }

    fn training_mode(&mut self, mode: bool) {
        Module::<&Array>::training_mode(&mut self.mixer, mode);
    }
}

impl Mamba {
    /// A stack without a vocabulary.
    ///
    /// # Errors
    /// When a size is below one.
    pub fn new(dims: i32, n_layers: i32) -> Result<Self> {
        Self::assemble(MambaBuilder::new(dims, n_layers))
    }

    fn assemble(builder: MambaBuilder) -> Result<Self> {
        use mlx_rs::builder::Builder;
        let MambaBuilder { dims, n_layers, vocab_size, norm_eps, .. } = builder;
        CHECK.at_least("n_layers", n_layers, 1)?;
        CHECK.at_least("vocab_size", vocab_size.unwrap_or(1), 1)?;
        let norm = || RmsNormBuilder::new(dims).eps(norm_eps).build();
        let layer = |_| Ok(MambaLayer { norm: norm()?, mixer: mixer(&builder)? });
        let layers = (0..n_layers).map(layer).collect::<Result<_>>()?;
        let embedding = vocab_size.map(|size| nn::Embedding::new(size, dims)).transpose()?;
        let embedding = embedding.map(TokenEmbedding::from);
        Ok(Self { backbone: MambaBackbone { embedding, layers, norm_f: norm()? } })
    }

    /// The states of all layers before the first step.
    pub fn states(&self) -> Vec<MambaState> {
        vec![MambaState::default(); self.backbone.layers.len()]
    }

    /// [`Module::forward`] that goes on from the states of earlier calls.
    ///
    /// # Errors
    /// When `x` is of another shape or dtype, or the states are those of another model or batch.
    pub fn forward_with(
        &mut self,
        x: impl AsRef<Array>,
        states: &mut [MambaState],
    ) -> Result<Array> {
        let mut next = self.matching(states)?;
        let mut hidden = self.embedded(x.as_ref(), axes!["B", "L"])?;
        for (layer, state) in self.backbone.layers.iter_mut().zip(&mut next) {
            hidden = layer.forward((&hidden, state))?;
        }
        let y = self.head(&hidden)?;
        states.clone_from_slice(&next);
        Ok(y)
    }

    /// [`Mamba::forward_with`] of one step, which costs the same however many came before.
    ///
    /// # Shapes
    /// Integer ids `[B]` to logits `[B, V]`, or without a vocabulary `[B, dims]` to `[B, dims]`.
    ///
    /// # Errors
    /// Those of [`Mamba::forward_with`].
    pub fn step(&mut self, x: impl AsRef<Array>, states: &mut [MambaState]) -> Result<Array> {
        let mut next = self.matching(states)?;
        let mut hidden = self.embedded(x.as_ref(), axes!["B"])?;
        for (layer, state) in self.backbone.layers.iter_mut().zip(&mut next) {
            hidden = layer.step(&hidden, state)?;
        }
        let y = self.head(&hidden)?;
        states.clone_from_slice(&next);
        Ok(y)
    }

    /// Copies, so that a call that fails leaves the caller's as they were.
    fn matching(&self, states: &[MambaState]) -> Result<Vec<MambaState>> {
        let layers = self.backbone.layers.len();
        let fits = states.len() == layers;
        CHECK.value(fits, "states", format_args!("number {layers}"), states.len())?;
        Ok(states.to_vec())
    }

    /// Vectors of ids, which have these axes, or vectors themselves, which have one more.
    fn embedded(&mut self, x: &Array, leading: &[Axis]) -> Result<Array> {
        match &mut self.backbone.embedding {
            None => {
                CHECK.floating("x", x)?;
                CHECK.shape("x", x, &[leading, axes!["dims"]].concat())?;
                Ok(x.clone())
            }
            Some(embedding) => {
                CHECK.integer("ids", x)?;
                CHECK.shape("ids", x, leading)?;
                Ok(embedding.forward(x)?)
            }
        }
    }

    fn head(&mut self, hidden: &Array) -> Result<Array> {
        let normed = self.backbone.norm_f.forward(hidden)?;
        match &mut self.backbone.embedding {
            None => Ok(normed),
            Some(embedding) => embedding.as_linear(normed),
        }
    }
}

fn mixer(builder: &MambaBuilder) -> Result<MambaMixer> {
    use mlx_rs::builder::Builder;
    let &MambaBuilder { dims, kind, d_state, d_conv, expand, .. } = builder;
    Ok(match kind {
        MambaKind::Mamba => {
            let block = MambaBlockBuilder::new(dims).d_conv(d_conv).expand(expand);
            block.d_state(d_state.unwrap_or(MambaBlock::DEFAULT_D_STATE)).build()?.into()
        }
        MambaKind::Mamba2 { head_dim, n_groups } => {
            let block = Mamba2BlockBuilder::new(dims).d_conv(d_conv).expand(expand);
            let block = block.d_state(d_state.unwrap_or(Mamba2Block::DEFAULT_D_STATE));
            block.head_dim(head_dim).n_groups(n_groups).build()?.into()
        }
    })
}

impl Module<&Array> for Mamba {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let mut states = self.states();
        Ok(self.forward_with(x, &mut states)?)
    }

    fn training_mode(&mut self, mode: bool) {
        for layer in &mut self.backbone.layers {
            Module::<&Array>::training_mode(layer, mode);
        }
    }
}

//! A llama made of the crate's layers.

use anyhow::{Result, bail};
use mlx_primitives::{
    attention::KvCache,
    dispatch::{Context, Target},
    generation::{CausalModel, LayerKv},
    layers::{
        AttentionBuilder, AttentionInput, DecoderBlock, DecoderBlockBuilder, GatedFeedForward,
        Projection, TokenEmbedding,
    },
    norm::RmsNorm,
    quant::{QuantizedEmbedding, QuantizedLinear},
    rope::{Rope, RopeBuilder, RopeStyle},
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    module::{Module, Param},
    nn,
    transforms::eval,
};

use crate::llama::gguf::{Checkpoint, LlamaConfig, Weight};

/// Token ids in, logits out.
#[derive(Debug)]
pub(crate) struct Llama {
    embedding: TokenEmbedding,
    blocks: Vec<DecoderBlock>,
    norm: RmsNorm,
    /// None where the embedding is the output head too.
    head: Option<Projection>,
    vocabulary: i32,
    /// What each block keeps of a token.
    layer: LayerKv,
}

impl Llama {
    /// Takes the weights as they are, and unpacks what the device multiplies unpacked.
    pub(crate) fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let config = checkpoint.config();
        let loader = Loader { checkpoint, target: Context::current()?.target };
        let blocks = (0..config.layers).map(|layer| loader.block(config, layer));
        Ok(Self {
            embedding: loader.embedding()?,
            blocks: blocks.collect::<Result<_>>()?,
            norm: loader.norm("output_norm", config)?,
            head: (!config.tied).then(|| loader.projection("output")).transpose()?,
            vocabulary: config.vocab,
            layer: LayerKv {
                num_kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                value_dim: None,
                dtype: loader.dtype(),
            },
        })
    }
}

impl CausalModel for Llama {
    fn vocabulary(&self) -> i32 {
        self.vocabulary
    }

    fn layers(&self) -> Vec<LayerKv> {
        vec![self.layer; self.blocks.len()]
    }

    fn hidden(
        &mut self,
        tokens: &Array,
        caches: &mut [&mut dyn KvCache],
    ) -> Result<Array, Exception> {
        let mut x = self.embedding.forward(tokens)?.as_dtype(self.layer.dtype)?;
        for (block, cache) in self.blocks.iter_mut().zip(caches) {
            x = block.forward(AttentionInput { x: &x, mask: None, cache: Some(&mut **cache) })?;
        }
        Ok(x)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        let last = self.norm.forward(hidden)?;
        match &mut self.head {
            Some(head) => head.forward(&last),
            None => Ok(self.embedding.as_linear(&last)?),
        }
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    target: Target,
}

impl Loader<'_> {
    /// f32 on a CPU, whose BLAS knows nothing smaller; on a GPU f16, as the file's scales are.
    fn dtype(&self) -> Dtype {
        match self.target {
            Target::Cpu => Dtype::Float32,
            _ => Dtype::Float16,
        }
    }

    fn block(&self, config: &LlamaConfig, layer: i32) -> Result<DecoderBlock> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let mut attention = AttentionBuilder::new(config.dims, config.heads)
            .num_kv_heads(config.kv_heads)
            .head_dim(config.head_dim)
            .rope(rope(config)?)
            .build()?;
        attention.query = self.projection(&name("attn_q"))?.into();
        attention.key = self.projection(&name("attn_k"))?.into();
        attention.value = self.projection(&name("attn_v"))?.into();
        attention.output = self.projection(&name("attn_output"))?.into();

        let mut feed_forward = GatedFeedForward::new(config.dims, config.ffn_dims)?;
        feed_forward.gate = self.projection(&name("ffn_gate"))?.into();
        feed_forward.up = self.projection(&name("ffn_up"))?.into();
        feed_forward.down = self.projection(&name("ffn_down"))?.into();

        let mut block = DecoderBlockBuilder::new(config.dims, attention, feed_forward).build()?;
        block.attention_norm = self.norm(&name("attn_norm"), config)?;
        block.feed_forward_norm = self.norm(&name("ffn_norm"), config)?;
        if self.target != Target::Cpu {
            block.prepare_for_inference()?;
        }
        Ok(block)
    }

    fn projection(&self, name: &str) -> Result<Projection> {
        Ok(match self.checkpoint.weight(name)? {
            Weight::Dense(weight) => {
                nn::Linear { weight: self.param(weight)?, bias: Param::new(None) }.into()
            }
            Weight::Packed(weight) => {
                let mut layer = QuantizedLinear::from_weight(weight)?;
                eval(layer.dense_copy()?)?;
                layer.into()
            }
        })
    }

    fn embedding(&self) -> Result<TokenEmbedding> {
        Ok(match self.checkpoint.weight("token_embd")? {
            Weight::Dense(weight) => nn::Embedding { weight: self.param(weight)? }.into(),
            Weight::Packed(weight) => {
                let mut table = QuantizedEmbedding::from_weight(weight)?;
                eval(table.dense_copy()?)?;
                table.into()
            }
        })
    }

    fn norm(&self, name: &str, config: &LlamaConfig) -> Result<RmsNorm> {
        let Weight::Dense(weight) = self.checkpoint.weight(name)? else {
            bail!("{name} is packed, but the weight of a norm never is");
        };
        Ok(RmsNorm { weight: self.param(weight)?, eps: config.rms_eps, unit_offset: false })
    }

    fn param(&self, weight: Array) -> Result<Param<Array>> {
        let weight = weight.as_dtype(self.dtype())?;
        weight.eval()?;
        Ok(Param::new(weight))
    }
}

/// The file's weights are permuted for rotation in neighbouring pairs.
fn rope(config: &LlamaConfig) -> Result<Rope> {
    let builder = RopeBuilder::new(config.head_dim).base(config.rope_base);
    Ok(builder.style(RopeStyle::Interleaved).build()?)
}

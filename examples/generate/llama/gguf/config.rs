//! The sizes of a llama, checked against the tensors the file holds.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

use super::{
    header::Header,
    metadata::{Metadata, required},
    tensor::Tensor,
};

/// What the metadata says of a llama's shape.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LlamaConfig {
    pub(crate) layers: i32,
    pub(crate) dims: i32,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) ffn_dims: i32,
    pub(crate) vocab: i32,
    pub(crate) context_length: usize,
    pub(crate) rope_base: f32,
    pub(crate) rms_eps: f32,
    /// Logits come from the token embedding: the file has no `output.weight`.
    pub(crate) tied: bool,
}

impl LlamaConfig {
    /// Reads the sizes, and checks that the file holds the tensors they imply and no others.
    pub(super) fn new(header: &Header) -> Result<Self> {
        let Header { metadata, tensors } = header;
        check_architecture(metadata)?;
        let heads = size(metadata, "llama.attention.head_count")?;
        let config = Self {
            layers: size(metadata, "llama.block_count")?,
            dims: size(metadata, "llama.embedding_length")?,
            heads,
            kv_heads: size_or(metadata, "llama.attention.head_count_kv", heads)?,
            head_dim: head_dim(metadata, heads)?,
            ffn_dims: size(metadata, "llama.feed_forward_length")?,
            vocab: vocab(metadata)?,
            context_length: size(metadata, "llama.context_length")?.unsigned_abs() as usize,
            rope_base: positive(metadata, "llama.rope.freq_base", Some(10_000.0))?,
            rms_eps: positive(metadata, "llama.attention.layer_norm_rms_epsilon", None)?,
            tied: !tensors.contains_key("output.weight"),
        };
        config.check_heads()?;
        config.check_tensors(tensors)?;
        Ok(config)
    }

    fn check_heads(&self) -> Result<()> {
        let Self { heads, kv_heads, .. } = self;
        ensure!(heads % kv_heads == 0, "{heads} heads cannot share {kv_heads} key-value heads");
        Ok(())
    }

    /// A tensor too many is a feature this llama lacks: attention biases, rotary scaling, experts.
    fn check_tensors(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut left = tensors.keys().collect::<BTreeSet<_>>();
        for (name, expected) in self.tensors() {
            let tensor = tensors.get(&name);
            let found = &tensor.with_context(|| format!("the file has no tensor {name:?}"))?.shape;
            ensure!(*found == expected, "tensor {name:?} is {found:?}, expected {expected:?}");
            left.remove(&name);
        }
        match left.first() {
            Some(name) => bail!("tensor {name:?} is not part of a plain llama"),
            None => Ok(()),
        }
    }

    /// The name and shape of every tensor.
    fn tensors(&self) -> impl Iterator<Item = (String, Vec<u64>)> {
        let [vocab, dims] = [self.vocab, self.dims].map(dim);
        let head = (!self.tied).then(|| ("output.weight".to_owned(), vec![vocab, dims]));
        let ends = [
            ("token_embd.weight".to_owned(), vec![vocab, dims]),
            ("output_norm.weight".to_owned(), vec![dims]),
        ];
        let layers = (0..self.layers).flat_map(|layer| {
            let named = move |(part, shape)| (format!("blk.{layer}.{part}.weight"), shape);
            self.layer_tensors().into_iter().map(named)
        });
        ends.into_iter().chain(head).chain(layers)
    }

    fn layer_tensors(&self) -> [(&'static str, Vec<u64>); 9] {
        let [dims, ffn_dims, head_dim] = [self.dims, self.ffn_dims, self.head_dim].map(dim);
        let [queries, keys] = [self.heads, self.kv_heads].map(|heads| dim(heads) * head_dim);
        [
            ("attn_norm", vec![dims]),
            ("attn_q", vec![queries, dims]),
            ("attn_k", vec![keys, dims]),
            ("attn_v", vec![keys, dims]),
            ("attn_output", vec![dims, queries]),
            ("ffn_norm", vec![dims]),
            ("ffn_gate", vec![ffn_dims, dims]),
            ("ffn_up", vec![ffn_dims, dims]),
            ("ffn_down", vec![dims, ffn_dims]),
        ]
    }
}

fn dim(size: i32) -> u64 {
    size.unsigned_abs().into()
}

fn check_architecture(metadata: &Metadata) -> Result<()> {
    let key = "general.architecture";
    let name = required(key, metadata.text(key))?;
    ensure!(name == "llama", "unsupported architecture {name:?}: this example runs llama");
    let scaling = metadata.text("llama.rope.scaling.type")?.unwrap_or("none");
    ensure!(scaling == "none", "unsupported rotary scaling {scaling:?}");
    Ok(())
}

/// The width of a head; keys, values and the rotary part must agree on it.
fn head_dim(metadata: &Metadata, heads: i32) -> Result<i32> {
    let dims = size(metadata, "llama.embedding_length")?;
    let head_dim = size_or(metadata, "llama.attention.key_length", dims / heads)?;
    for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        let other = size_or(metadata, key, head_dim)?;
        ensure!(other == head_dim, "{key} is {other}, unsupported beside heads of {head_dim}");
    }
    ensure!(head_dim > 0 && head_dim % 2 == 0, "heads of {head_dim} cannot be rotated by pairs");
    Ok(head_dim)
}

fn vocab(metadata: &Metadata) -> Result<i32> {
    let key = "tokenizer.ggml.tokens";
    let tokens = required(key, metadata.texts(key))?;
    i32::try_from(tokens.len()).with_context(|| format!("{key} is too long"))
}

fn size(metadata: &Metadata, key: &str) -> Result<i32> {
    let value = required(key, metadata.integer(key))?;
    match i32::try_from(value) {
        Ok(size) if size > 0 => Ok(size),
        _ => bail!("{key} must be from 1 to {}, got {value}", i32::MAX),
    }
}

fn size_or(metadata: &Metadata, key: &str, default: i32) -> Result<i32> {
    if metadata.integer(key)?.is_some() { size(metadata, key) } else { Ok(default) }
}

fn positive(metadata: &Metadata, key: &str, default: Option<f64>) -> Result<f32> {
    let value = required(key, metadata.float(key).map(|found| found.or(default)))?;
    let value = value as f32;
    ensure!(value.is_finite() && value > 0.0, "{key} must be positive, got {value}");
    Ok(value)
}

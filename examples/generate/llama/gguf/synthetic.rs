//! GGUF files written by the tests.

use super::{Metadata, header::Header};

/// A file in parts, so that a test can break any one of them.
#[derive(Clone)]
pub(crate) struct File {
    pub(crate) version: u32,
    pub(crate) pairs: Vec<(String, Vec<u8>)>,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) data: usize,
}

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// As the file has it: columns first.
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
}

/// The smallest llama: one layer, one head of 2, a vocabulary of 3, all F32.
pub(crate) fn llama() -> File {
    let mut file = File { version: 3, pairs: llama_pairs(), tensors: Vec::new(), data: 0 };
    file.add("token_embd.weight", &[2, 3]);
    file.add("output_norm.weight", &[2]);
    for part in ["attn_norm", "ffn_norm"] {
        file.add(&format!("blk.0.{part}.weight"), &[2]);
    }
    for part in ["attn_q", "attn_k", "attn_v", "attn_output"] {
        file.add(&format!("blk.0.{part}.weight"), &[2, 2]);
    }
    file.add("blk.0.ffn_gate.weight", &[2, 4]);
    file.add("blk.0.ffn_up.weight", &[2, 4]);
    file.add("blk.0.ffn_down.weight", &[4, 2]);
    file
}

fn llama_pairs() -> Vec<(String, Vec<u8>)> {
    let mut pairs = vec![
        ("general.architecture".to_owned(), text("llama")),
        ("tokenizer.ggml.tokens".to_owned(), texts(&["a", "b", "ab"])),
        ("llama.attention.layer_norm_rms_epsilon".to_owned(), float(1e-5)),
    ];
    let sizes = [
        ("block_count", 1),
        ("embedding_length", 2),
        ("feed_forward_length", 4),
        ("context_length", 16),
        ("attention.head_count", 1),
    ];
    pairs.extend(sizes.map(|(key, size)| (format!("llama.{key}"), integer(size))));
    pairs
}

/// A file without tensors, for its tokenizer of ten tokens.
pub(crate) fn tokenizer() -> File {
    let tokens = ["a", "b", "ab", "Ġ", "1", "2", "12", "<|im_start|>", "<|im_end|>", "<user>"];
    let pairs = [
        ("model", text("gpt2")),
        ("pre", text("smollm")),
        ("tokens", texts(&tokens)),
        ("merges", texts(&["a b", "1 2"])),
        ("token_type", integers(&[1, 1, 1, 1, 1, 1, 1, 3, 3, 4])),
        ("bos_token_id", integer(7)),
        ("eos_token_id", integer(8)),
    ];
    let pairs = pairs.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).to_vec();
    File { version: 3, pairs, tensors: Vec::new(), data: 0 }
}

impl File {
    pub(crate) fn metadata(&self) -> Metadata {
        let bytes = self.bytes();
        Header::read(bytes.as_slice(), bytes.len() as u64).unwrap().metadata
    }

    /// Appends an F32 tensor and its data.
    pub(crate) fn add(&mut self, name: &str, dims: &[u64]) {
        let (name, offset) = (name.to_owned(), self.data as u64);
        self.tensors.push(Tensor { name, dims: dims.to_vec(), kind: 0, offset });
        let bytes = dims.iter().product::<u64>() as usize * size_of::<f32>();
        self.data += bytes.next_multiple_of(32);
    }

    pub(crate) fn set(&mut self, key: &str, value: Vec<u8>) {
        self.pairs.retain(|(other, _)| other != key);
        self.pairs.push((key.to_owned(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.pairs.retain(|(other, _)| other != key);
    }

    pub(crate) fn header(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            bytes.extend(string(key));
            bytes.extend(value);
        }
        bytes.extend(self.tensors.iter().flat_map(Tensor::bytes));
        bytes
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header();
        bytes.resize(bytes.len().next_multiple_of(32) + self.data, 0);
        bytes
    }
}

impl Tensor {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = string(&self.name);
        bytes.extend((self.dims.len() as u32).to_le_bytes());
        bytes.extend(self.dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.offset.to_le_bytes());
        bytes
    }
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// A value of type `kind`, as its bytes.
pub(crate) fn value(kind: u32, payload: impl IntoIterator<Item = u8>) -> Vec<u8> {
    kind.to_le_bytes().into_iter().chain(payload).collect()
}

pub(crate) fn integer(number: u32) -> Vec<u8> {
    value(4, number.to_le_bytes())
}

pub(crate) fn float(number: f32) -> Vec<u8> {
    value(6, number.to_le_bytes())
}

pub(crate) fn flag(truth: bool) -> Vec<u8> {
    value(7, [truth.into()])
}

pub(crate) fn text(text: &str) -> Vec<u8> {
    value(8, string(text))
}

pub(crate) fn texts(values: &[&str]) -> Vec<u8> {
    list(8, values.len(), values.iter().flat_map(|text| string(text)))
}

pub(crate) fn integers(values: &[i32]) -> Vec<u8> {
    list(5, values.len(), values.iter().flat_map(|value| value.to_le_bytes()))
}

pub(crate) fn list(kind: u32, len: usize, items: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let head = kind.to_le_bytes().into_iter().chain((len as u64).to_le_bytes());
    value(9, head.chain(items))
}

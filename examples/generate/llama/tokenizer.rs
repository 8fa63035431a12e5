//! The tokenizer inside a GGUF file: byte-pair encoding over bytes, as GPT-2 introduced it.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use mlx_primitives::generation::Detokenizer;
use tokenizers::{
    AddedToken, Error, PreTokenizerWrapper,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence},
};

use crate::llama::gguf::{Metadata, required};

/// What a token is for, as numbered by GGUF; everything else is plain text.
mod kind {
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER: i64 = 4;
}

/// Control tokens that end a turn or a document in one family of models or another. Metadata names
/// only one of them as the end, and a model may write any that it has.
const END_NAMES: [&str; 6] =
    ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>"];

/// Text to tokens, and each token back to bytes.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    texts: Vec<String>,
    /// What each token adds to the text; nothing for control tokens.
    bytes: Vec<Vec<u8>>,
    begin: Option<u32>,
    end: Option<u32>,
    leads_with_begin: bool,
    stops: Vec<u32>,
}

impl Tokenizer {
    pub(crate) fn new(metadata: &Metadata) -> Result<Self> {
        let key = "tokenizer.ggml.model";
        let model = required(key, metadata.text(key))?;
        ensure!(model == "gpt2", "unsupported tokenizer {model:?}: this example reads gpt2");
        let key = "tokenizer.ggml.tokens";
        let texts = required(key, metadata.texts(key))?.to_vec();
        let kinds = kinds(metadata, texts.len())?;
        let begin = token_id(metadata, "bos", texts.len())?;
        let end = token_id(metadata, "eos", texts.len())?;
        Ok(Self {
            inner: inner(metadata, &texts, &kinds)?,
            bytes: token_bytes(&texts, &kinds),
            begin,
            end,
            leads_with_begin: metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(false),
            stops: stops(metadata, &texts, &kinds)?,
            texts,
        })
    }

    /// The tokens of `text`, in which special tokens may be written out.
    ///
    /// A byte that the vocabulary has no token for is dropped, as where the model was trained.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(anyhow_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token that a text without a chat template begins with, if this model wants one.
    pub(crate) fn lead(&self) -> Option<u32> {
        self.begin.filter(|_| self.leads_with_begin)
    }

    /// What `token` adds to the text: often a part of a character.
    pub(crate) fn bytes(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// The tokens after which the model has no more to say.
    pub(crate) fn stops(&self) -> &[u32] {
        &self.stops
    }

    pub(crate) fn begin_text(&self) -> &str {
        self.text(self.begin)
    }

    pub(crate) fn end_text(&self) -> &str {
        self.text(self.end)
    }

    fn text(&self, token: Option<u32>) -> &str {
        token.and_then(|token| self.texts.get(token as usize)).map_or("", String::as_str)
    }
}

fn inner(metadata: &Metadata, texts: &[String], kinds: &[i64]) -> Result<tokenizers::Tokenizer> {
    let mut inner = tokenizers::Tokenizer::new(pair_encoding(metadata, texts)?);
    inner.with_pre_tokenizer(Some(pre_tokenizer(metadata)?));
    let added = texts.iter().zip(kinds).filter_map(|(text, kind)| match *kind {
        kind::CONTROL => Some(AddedToken::from(text, true)),
        kind::USER => Some(AddedToken::from(text, false).normalized(false)),
        _ => None,
    });
    inner.add_tokens(added).map_err(anyhow_error)?;
    Ok(inner)
}

fn pair_encoding(metadata: &Metadata, texts: &[String]) -> Result<BPE> {
    let vocab = texts.iter().cloned().zip(0..).collect::<Vocab>();
    ensure!(vocab.len() == texts.len(), "damaged: the vocabulary has a token twice");
    let key = "tokenizer.ggml.merges";
    let merges = required(key, metadata.texts(key))?;
    let merges = merges.iter().map(|merge| split_merge(merge, &vocab)).collect::<Result<_>>()?;
    BPE::builder().vocab_and_merges(vocab, merges).build().map_err(anyhow_error)
}

/// The two tokens of a merge rule. Their union must be one too: the crate panics otherwise.
fn split_merge(merge: &str, vocab: &Vocab) -> Result<(String, String)> {
    let pair = merge.split_once(' ');
    let known = |(left, right): &(&str, &str)| {
        [*left, *right, &format!("{left}{right}")].iter().all(|part| vocab.contains_key(*part))
    };
    let (left, right) = pair
        .filter(known)
        .with_context(|| format!("damaged: merge {merge:?} is not of the vocabulary"))?;
    Ok((left.to_owned(), right.to_owned()))
}

/// How text is cut into words before any merging.
fn pre_tokenizer(metadata: &Metadata) -> Result<PreTokenizerWrapper> {
    let words = ByteLevel::new(false, true, true);
    let key = "tokenizer.ggml.pre";
    Ok(match required(key, metadata.text(key))? {
        "gpt-2" => words.into(),
        "smollm" => Sequence::new(vec![Digits::new(true).into(), words.into()]).into(),
        other => bail!("unsupported pre-tokenizer {other:?}: this example has gpt-2 and smollm"),
    })
}

fn kinds(metadata: &Metadata, tokens: usize) -> Result<Vec<i64>> {
    let key = "tokenizer.ggml.token_type";
    let kinds = required(key, metadata.integers(key))?;
    ensure!(kinds.len() == tokens, "{key} is for {} tokens, but there are {tokens}", kinds.len());
    Ok(kinds.to_vec())
}

fn token_id(metadata: &Metadata, name: &str, tokens: usize) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(id) = metadata.integer(&key)? else { return Ok(None) };
    let token = u32::try_from(id).ok().filter(|token| (*token as usize) < tokens);
    token.map(Some).with_context(|| format!("{key} is {id}, but there are {tokens} tokens"))
}

fn stops(metadata: &Metadata, texts: &[String], kinds: &[i64]) -> Result<Vec<u32>> {
    let mut stops = Vec::new();
    for name in ["eos", "eot", "eom"] {
        stops.extend(token_id(metadata, name, texts.len())?);
    }
    let named = |(text, kind): (&String, &i64)| {
        *kind == kind::CONTROL && END_NAMES.contains(&text.as_str())
    };
    let named = texts.iter().zip(kinds).zip(0..).filter(|(token, _)| named(*token));
    stops.extend(named.map(|(_, id)| id));
    stops.sort_unstable();
    stops.dedup();
    Ok(stops)
}

fn token_bytes(texts: &[String], kinds: &[i64]) -> Vec<Vec<u8>> {
    let alphabet = alphabet();
    let plain =
        |text: &String| match text.chars().map(|char| alphabet.get(&char).copied()).collect() {
            Some(bytes) => bytes,
            None => text.as_bytes().to_vec(),
        };
    let tokens = texts.iter().zip(kinds);
    tokens
        .map(|(text, kind)| match *kind {
            kind::UNKNOWN | kind::CONTROL => Vec::new(),
            kind::USER => text.as_bytes().to_vec(),
            _ => plain(text),
        })
        .collect()
}

/// The characters that stand for bytes in the vocabulary: printable ones for themselves, the others
/// numbered from 256.
fn alphabet() -> HashMap<char, u8> {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let (kept, moved) = (0..=u8::MAX).partition::<Vec<_>, _>(printable);
    let kept = kept.into_iter().map(|byte| (char::from(byte), byte));
    kept.chain(('\u{100}'..).zip(moved)).collect()
}

fn anyhow_error(error: Error) -> anyhow::Error {
    anyhow::Error::from_boxed(error)
}

impl Detokenizer for Tokenizer {
    fn bytes(&self, token: u32) -> Vec<u8> {
        Self::bytes(self, token).to_vec()
    }
}

#[cfg(test)]
mod tests;

//! A llama from a GGUF file, with its tokenizer and its chat template.

pub(crate) mod gguf;
pub(crate) mod model;
pub(crate) mod template;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod tokenizer;

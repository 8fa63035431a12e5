//! Engines whose tokens are written by a kernel, where they go, while steps before are underway.

use mlx_primitives::{
    Backend, Dispatch,
    attention::{BlockForm, FlashAttentionOptions, KvCache},
    dispatch::Target,
    generation::{
        CausalModel, GenerationEngine, GenerationEngineOptions, GenerationRequest, LayerKv,
    },
    layout::Layout,
    rope::{RopeFrequencies, RopeOptions, RopeStyle},
};
use mlx_rs::{Array, Dtype, error::Exception};

use super::{all_texts, params, prompt, request};
use crate::support::{host, sample::normal};

const VOCABULARY: i32 = super::model::VOCABULARY;
const HEADS: i32 = 4;
const SIZE: i32 = 8;

/// Attention over tables of queries, keys and values.
struct Tables {
    tables: [Array; 3],
    dispatch: Dispatch,
    /// As often a layer attends in a step.
    times: usize,
    /// Whether queries and keys turn.
    turns: bool,
}

impl Tables {
    fn new(dispatch: Dispatch, times: usize) -> Self {
        let tables =
            [21, 22, 23].map(|seed| normal(seed, &[VOCABULARY, HEADS * SIZE], Dtype::Float32));
        Self { tables, dispatch, times, turns: false }
    }
}

impl CausalModel for Tables {
    fn vocabulary(&self) -> i32 {
        VOCABULARY
    }

    fn layers(&self) -> Vec<LayerKv> {
        let layer = LayerKv {
            num_kv_heads: HEADS / 2,
            head_dim: SIZE,
            value_dim: None,
            dtype: Dtype::Float32,
        };
        vec![layer; 2]
    }

    fn hidden(
        &mut self,
        tokens: &Array,
        caches: &mut [&mut dyn KvCache],
    ) -> Result<Array, Exception> {
        let count = tokens.dim(0);
        let rows = |table: usize| self.tables[table].take_axis(tokens, 0);
        let mut x = rows(0)?;
        for cache in caches {
            let queries = x.add(rows(1)?)?.reshape(&[count, 1, HEADS, SIZE])?;
            let of_heads =
                |x: Array| x.reshape(&[count, 1, 2, HEADS / 2, SIZE])?.sum_axis(2, false);
            let (keys, values) = (of_heads(x.add(rows(2)?)?)?, of_heads(x.clone())?);
            let options = FlashAttentionOptions {
                causal: true,
                layout: Layout::Bshd,
                dispatch: self.dispatch,
                ..Default::default()
            };
            for _ in 0..self.times {
                let attended = if self.turns {
                    cache.attend_with_rope(&queries, &keys, &values, rope(), options.clone())?
                } else {
                    cache.attend(&queries, &keys, &values, options.clone())?
                };
                x = x.add(attended.reshape(&[count, 1, HEADS * SIZE])?)?;
            }
        }
        Ok(x)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        hidden.matmul(self.tables[1].t())
    }
}

/// Of half of each head, by pairs of neighbours.
fn rope() -> RopeOptions {
    let mut frequencies = RopeFrequencies::from(vec![1.0, 0.4]);
    frequencies.magnitude = 1.25;
    RopeOptions {
        dims: Some(SIZE / 2),
        style: RopeStyle::Interleaved,
        frequencies: Some(frequencies),
        ..Default::default()
    }
}

fn texts(
    model: Tables,
    form: BlockForm,
    run_ahead: bool,
    requests: &[GenerationRequest],
) -> Vec<Vec<u32>> {
    let options = GenerationEngineOptions {
        cache_bytes: 1 << 20,
        cache_keys: form,
        cache_values: form,
        max_prompt_chunk: 16,
        run_ahead: Some(run_ahead),
        ..Default::default()
    };
    let engine = GenerationEngine::new(model, options).unwrap();
    let texts = all_texts(&engine, requests).into_iter().flatten();
    texts.map(|text| text.tokens).collect()
}

const BY_REFERENCE: Dispatch = Dispatch::Only(Backend::Reference);
const BY_KERNEL: Dispatch = Dispatch::Only(Backend::Kernel);

#[test]
fn texts_are_those_of_blocks_that_are_written_anew() {
    if !host::install() {
        return;
    }
    // The choices of the first copy the block in which its prompt ends.
    let requests = [(30, 6, 3), (3, 4, 1), (9, 7, 1)].map(|(len, tokens, n)| {
        let request = request(prompt(len as u64, len), tokens, params(5, 1.0));
        GenerationRequest { n, ..request }
    });
    for form in [BlockForm::Plain, BlockForm::Int8, BlockForm::Fp8] {
        let expected = texts(Tables::new(BY_REFERENCE, 1), form, false, &requests);
        assert_eq!(expected.len(), 5);
        for run_ahead in [false, true] {
            let found = texts(Tables::new(BY_KERNEL, 1), form, run_ahead, &requests);
            assert_eq!(found, expected, "{form:?}, run_ahead {run_ahead}");
        }
    }
    // A GPU's tests of memory tell it there.
    if Target::current().unwrap() == Target::Cpu {
        assert!(host::has_run("append_to_blocks", &[1, HEADS, SIZE]));
        assert!(host::has_run("copy_blocks", &[2]), "two copies for three choices");
    }
}

#[test]
fn a_layer_may_attend_again() {
    if !host::install() {
        return;
    }
    let requests = [request(prompt(1, 5), 4, params(5, 1.0))];
    let [expected, found] = [BY_REFERENCE, BY_KERNEL]
        .map(|dispatch| texts(Tables::new(dispatch, 2), BlockForm::Plain, true, &requests));
    assert_eq!(found, expected);
}

#[test]
fn queries_and_keys_turn_as_they_are_written() {
    if !host::install() {
        return;
    }
    let requests = [(20, 5), (3, 7)]
        .map(|(len, tokens)| request(prompt(len, len as usize), tokens, params(5, 1.0)));
    let turning = |dispatch| Tables { turns: true, ..Tables::new(dispatch, 1) };
    for form in [BlockForm::Plain, BlockForm::Int8] {
        let expected = texts(turning(BY_REFERENCE), form, false, &requests);
        assert_ne!(expected, texts(Tables::new(BY_REFERENCE, 1), form, false, &requests));
        for run_ahead in [false, true] {
            let found = texts(turning(BY_KERNEL), form, run_ahead, &requests);
            assert_eq!(found, expected, "{form:?}, run_ahead {run_ahead}");
        }
    }
    if Target::current().unwrap() == Target::Cpu {
        assert!(host::has_run_with("append_to_blocks", "DIMS", SIZE / 2));
    }
}

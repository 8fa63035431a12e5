//! Engines whose tokens are written by a kernel, where they go, while steps before are underway.

use mlx_primitives::{
    Backend, Dispatch,
    attention::{BlockForm, FlashAttentionOptions, KvCache},
    generation::{
        CausalModel, GenerationEngine, GenerationEngineOptions, GenerationRequest, LayerKv,
    },
    layout::Layout,
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
}

impl Tables {
    fn new(dispatch: Dispatch) -> Self {
        let tables =
            [21, 22, 23].map(|seed| normal(seed, &[VOCABULARY, HEADS * SIZE], Dtype::Float32));
        Self { tables, dispatch }
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
            let attended = cache.attend(&queries, &keys, &values, options)?;
            x = x.add(attended.reshape(&[count, 1, HEADS * SIZE])?)?;
        }
        Ok(x)
    }

    fn logits(&mut self, hidden: &Array) -> Result<Array, Exception> {
        hidden.matmul(self.tables[1].t())
    }
}

fn texts(
    dispatch: Dispatch,
    form: BlockForm,
    run_ahead: bool,
    requests: &[GenerationRequest],
) -> Vec<Vec<u32>> {
    let options = GenerationEngineOptions {
        cache_bytes: 1 << 20,
        cache_keys: form,
        cache_values: form,
        max_prompt_chunk: 16,
        run_ahead,
        ..Default::default()
    };
    let engine = GenerationEngine::new(Tables::new(dispatch), options).unwrap();
    let texts = all_texts(&engine, requests).into_iter().flatten();
    texts.map(|text| text.tokens).collect()
}

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
        let expected = texts(Dispatch::Only(Backend::Reference), form, false, &requests);
        assert_eq!(expected.len(), 5);
        for run_ahead in [false, true] {
            let found = texts(Dispatch::Only(Backend::Kernel), form, run_ahead, &requests);
            assert_eq!(found, expected, "{form:?}, run_ahead {run_ahead}");
        }
    }
}

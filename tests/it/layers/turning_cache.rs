//! A cache that turns queries and keys itself.

use mlx_primitives::{
    attention::{FlashAttentionOptions, KvCache},
    cache::SimpleKvCache,
    layers::AttentionInput,
    rope::{Rope, RopeOffset, RopeOptions},
};
use mlx_rs::{Array, module::Module, ops::concatenate};

use super::{attention, attention_with_norms, input, split};
use crate::support::{
    compare::{Tolerance, assert_close},
    tensor::Tensor,
};

/// A cache that turns what it appends, and counts how often.
#[derive(Debug, Default)]
struct TurningCache {
    kv: SimpleKvCache,
    turned: usize,
}

impl KvCache for TurningCache {
    fn offset(&self) -> RopeOffset<'_> {
        self.kv.offset()
    }

    fn attend(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        options: FlashAttentionOptions<'_>,
    ) -> mlx_primitives::Result<Array> {
        self.kv.attend(queries, keys, values, options)
    }

    fn applies_rope(&self) -> bool {
        true
    }

    fn attend_with_rope(
        &mut self,
        queries: &Array,
        keys: &Array,
        values: &Array,
        rope: RopeOptions,
        options: FlashAttentionOptions<'_>,
    ) -> mlx_primitives::Result<Array> {
        self.turned += 1;
        self.kv.attend_with_rope(queries, keys, values, rope, options)
    }
}

#[test]
fn a_cache_may_turn_what_it_appends() {
    let mut prepared = attention();
    prepared.prepare_for_inference().unwrap();
    let normed = attention_with_norms(Some(Rope::new(4).unwrap()));
    for (what, mut attention, calls) in
        [("plain", attention(), 2), ("prepared", prepared, 2), ("normed", normed, 0)]
    {
        // One token and several are in either layout.
        let x = input(2, 6);
        let whole = Tensor::of(&attention.forward(&x).unwrap());
        let mut cache = TurningCache::default();
        let parts = split(&x, &[5, 1]);
        let parts: Vec<_> = parts
            .iter()
            .map(|part| {
                attention.forward(AttentionInput { x: part, mask: None, cache: Some(&mut cache) })
            })
            .collect::<Result<_, _>>()
            .unwrap();
        assert_close(what, &concatenate(&parts, 1).unwrap(), &whole, Tolerance::LAYER);
        assert_eq!(cache.turned, calls, "{what}");
    }
}

use mlx_primitives::{
    attention::{FlashAttentionOptions, KvCache},
    cache::{
        Cache, LayerCache, LayerCaches, RotatingKvCache, RotatingKvCacheOptions, SimpleKvCache,
        load_caches,
    },
    layers::Attention,
    ssm::{H3State, Mamba2Block, Mamba2BlockBuilder, MambaState},
};
use mlx_rs::{Array, Dtype, builder::Builder, module::Module};

use crate::support::{sample::normal, tensor::Tensor};

/// A model of one layer of each kind.
struct Model {
    recurrence: Mamba2Block,
    attention: Attention,
}

impl Model {
    fn forward(&mut self, x: &Array, caches: &mut LayerCaches<MambaState>) -> Tensor {
        let [LayerCache::State(state), LayerCache::Attention(cache)] = &mut caches.layers[..]
        else {
            panic!("a state and a cache")
        };
        let h = self.recurrence.forward((x, state)).unwrap();
        Tensor::of(&self.attention.forward((&h, cache)).unwrap())
    }
}

fn model() -> Model {
    let recurrence = Mamba2BlockBuilder::new(16).d_state(4).head_dim(8).build().unwrap();
    Model { recurrence, attention: Attention::new(16, 2).unwrap() }
}

fn caches(attention: Box<dyn Cache>) -> LayerCaches<MambaState> {
    LayerCaches::new(vec![
        LayerCache::State(MambaState::default()),
        LayerCache::Attention(attention),
    ])
}

fn undo(undo: i32) -> Box<dyn Cache> {
    let options = RotatingKvCacheOptions { undo, ..RotatingKvCacheOptions::new(4) };
    Box::new(RotatingKvCache::with_options(options).unwrap())
}

#[test]
fn a_guess_that_is_rolled_back_leaves_no_trace() {
    for attention in [Box::new(SimpleKvCache::new()) as Box<dyn Cache>, undo(6)] {
        let (mut model, mut caches) = (model(), caches(attention));
        let x = |seed, count| normal(seed, &[1, count, 16], Dtype::Float32);
        model.forward(&x(1, 9), &mut caches);
        let checkpoint = caches.checkpoint();
        let mut other = caches.fork().unwrap();
        for guess in 2..4 {
            model.forward(&x(guess, 3), &mut caches);
            model.forward(&x(guess, 1), &mut caches);
            assert!(caches.can_roll_back(&checkpoint));
            caches.rollback(&checkpoint).unwrap();
        }
        assert_eq!(model.forward(&x(5, 2), &mut caches), model.forward(&x(5, 2), &mut other));
    }
}

#[test]
fn a_place_out_of_reach_is_refused_and_nothing_changes() {
    let (mut model, mut caches) = (model(), caches(undo(1)));
    let x = |count| normal(1, &[1, count, 16], Dtype::Float32);
    let start = caches.checkpoint();
    model.forward(&x(9), &mut caches);
    let refused = |caches: &mut LayerCaches<_>, place: &_| {
        assert!(!caches.can_roll_back(place));
        caches.rollback(place).unwrap_err().to_string()
    };
    assert_eq!(
        refused(&mut caches, &start),
        "[LayerCaches] checkpoint must be within reach of layer 1 but got position 0"
    );
    let LayerCache::State(state) = &caches.layers[0] else { panic!("a state") };
    assert!(state.scan().is_some(), "no layer is rolled back alone");

    let mut short = LayerCaches::new(vec![LayerCache::State(MambaState::default())]);
    assert!(refused(&mut caches, &short.checkpoint()).contains("be one of 2 layers but got 1"));
    assert!(refused(&mut short, &start).contains("be one of 1 layers but got 2"));
    caches.layers.swap(0, 1);
    assert!(refused(&mut caches, &start).contains("a layer of another kind"));

    let mut cache = SimpleKvCache::new();
    let empty = LayerCaches::<MambaState>::new(vec![LayerCache::Attention(cache.fork().unwrap())]);
    let q = normal(1, &[1, 2, 2, 8], Dtype::Float32);
    cache.attend(&q, &q, &q, FlashAttentionOptions::default()).unwrap();
    let later = LayerCaches::new(vec![LayerCache::Attention(Box::new(cache) as Box<dyn Cache>)]);
    assert!(!empty.can_roll_back(&later.checkpoint()), "it never held so many");
}

#[test]
fn a_list_goes_on_after_a_file_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layers.safetensors");
    let (mut model, mut caches) = (model(), caches(undo(2)));
    // Before the first step, and after some.
    for steps in [0, 5] {
        if steps > 0 {
            model.forward(&normal(1, &[1, steps, 16], Dtype::Float32), &mut caches);
        }
        caches.save(&path, "a model").unwrap();
        let mut loaded = LayerCaches::<MambaState>::load(&path, "a model").unwrap();
        let x = normal(2, &[1, 2, 16], Dtype::Float32);
        let expected = model.forward(&x, &mut caches.fork().unwrap());
        assert_eq!(model.forward(&x, &mut loaded), expected, "after {steps} steps");
    }
    // Keys and values of 6 tokens of 16 numbers, states of 4 heads of 8 by 4, and 3 inputs of a convolution of 40 channels.
    assert_eq!(caches.nbytes(), 4 * (2 * 6 * 16 + 4 * 8 * 4 + 3 * 40));
    assert!(LayerCaches::<MambaState>::load(&path, "another").is_err());
    let other = LayerCaches::<H3State>::load(&path, "a model").unwrap_err().to_string();
    assert_eq!(other, "[load_caches] arrays must be those of such a state but got 2 of them");
    assert!(load_caches(&path, "a model").is_err(), "a state is no cache of tokens");
}

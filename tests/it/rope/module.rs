use mlx_primitives::{
    Backend, Error, Layout,
    norm::RmsNorm,
    rope::{Rope, RopeBuilder, RopeOptions, RopeScaling, RopeStyle, Yarn, rope},
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, ModuleParameters as _},
    nn::Sequential,
};

use super::{OP, oracle::Oracle};
use crate::support::{
    compare::{Tolerance, assert_close},
    modules::assert_module,
    sample::normal,
    tensor::Tensor,
};

fn x(dtype: Dtype) -> Array {
    normal(1, &[2, 5, 3, 16], dtype)
}

fn build(builder: RopeBuilder) -> Rope {
    builder.build().unwrap()
}

/// [`rope`] with the frequencies of `scaling` at `sequence_length`.
fn scaled(x: &Array, offset: i32, scaling: &RopeScaling, sequence_length: i32) -> Tensor {
    let frequencies = scaling.frequencies(16, 10_000.0, sequence_length).unwrap();
    let options = RopeOptions { frequencies: Some(frequencies), ..Default::default() };
    Tensor::of(&rope(x, offset, options).unwrap())
}

/// A module without parameters cannot train alone.
#[derive(Debug, Clone, ModuleParameters)]
struct NormThenRope {
    #[param]
    norm: RmsNorm,
    #[param]
    rope: Rope,
}

impl Module<&Array> for NormThenRope {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        self.rope.forward(&self.norm.forward(x)?)
    }

    fn training_mode(&mut self, _: bool) {}
}

#[test]
fn the_module_lets_others_train_and_composes() {
    let module = NormThenRope { norm: RmsNorm::new(16).unwrap(), rope: Rope::new(16).unwrap() };
    assert_module(module, &x(Dtype::Float32), &["norm.weight"]);
    let x = x(Dtype::Float32);
    let mut sequence = Sequential::new().append(Rope::new(16).unwrap());
    let expected = Tensor::of(&rope(&x, 0, RopeOptions::default()).unwrap());
    assert_close("Rope in Sequential", &sequence.forward(&x).unwrap(), &expected, Tolerance::EXACT);
}

#[test]
fn the_module_has_no_parameters() {
    assert_eq!(Rope::new(16).unwrap().num_parameters(), 0);
}

#[test]
fn the_module_is_the_function() {
    let x = x(Dtype::Float32);
    let builder = RopeBuilder::new(8).base(500.0).style(RopeStyle::Interleaved);
    let mut module = build(builder.layout(Layout::Bhsd));
    let options = RopeOptions {
        dims: Some(8),
        base: 500.0,
        style: RopeStyle::Interleaved,
        layout: Layout::Bhsd,
        ..Default::default()
    };
    let starts = Array::from_slice(&[7_i32, 2], &[2]);
    for (got, expected) in [
        (module.forward(&x), rope(&x, 0, options.clone())),
        (module.forward((&x, 7)), rope(&x, 7, options.clone())),
        (module.forward((&x, &starts)), rope(&x, &starts, options)),
    ] {
        assert_close("Rope", &got.unwrap(), &Tensor::of(&expected.unwrap()), Tolerance::EXACT);
    }
}

#[test]
fn queries_and_keys_turn_alike_whatever_their_heads() {
    let queries = x(Dtype::Float32);
    let keys = normal(2, &[2, 5, 1, 16], Dtype::Float32);
    let module = Rope::new(16).unwrap();
    let (turned_queries, turned_keys) = module.rotate(&queries, &keys, 9).unwrap();
    for (got, x) in [(turned_queries, queries), (turned_keys, keys)] {
        let expected = Tensor::of(&module.forward_at(&x, 9).unwrap());
        assert_close("Rope::rotate", &got, &expected, Tolerance::EXACT);
    }
}

#[test]
fn the_dtype_of_the_first_call_leaves_no_trace() {
    let mut module = Rope::new(16).unwrap();
    module.forward((&x(Dtype::Float16), 4095)).unwrap();
    let x = x(Dtype::Float32);
    let oracle = Oracle::new(RopeStyle::HalfSplit, 16, 2, 4095);
    let values = Tensor::of(&x);
    let tolerance = oracle.tolerance(Backend::Builtin, &values, Dtype::Float32);
    let y = module.forward((&x, 4095)).unwrap();
    assert_close("Rope after f16", &y, &oracle.rotate(&values), tolerance);
}

#[test]
fn a_scaling_changes_frequencies_and_magnitude() {
    let x = x(Dtype::Float32);
    let scaling = RopeScaling::Yarn(Yarn::new(4.0, 64));
    let module = build(RopeBuilder::new(16).scaling(scaling.clone()));
    let y = module.forward_at(&x, 100).unwrap();
    assert_close("Rope with YaRN", &y, &scaled(&x, 100, &scaling, 1), Tolerance::EXACT);
}

fn dynamic() -> RopeScaling {
    RopeScaling::DynamicNtk { factor: 2.0, original_max_positions: 8 }
}

fn long() -> RopeScaling {
    RopeScaling::LongRope {
        short_factor: vec![1.0; 8],
        long_factor: vec![3.0; 8],
        original_max_positions: 8,
        max_positions: 32,
    }
}

#[test]
fn scalings_that_follow_the_length_count_the_offset() {
    let x = x(Dtype::Float32);
    for scaling in [dynamic(), long()] {
        let module = build(RopeBuilder::new(16).scaling(scaling.clone()));
        for (offset, length) in [(0, 5), (3, 8), (4, 9), (100, 105)] {
            let y = module.forward_at(&x, offset).unwrap();
            let expected = scaled(&x, offset, &scaling, length);
            assert_close(&format!("{scaling:?} from {offset}"), &y, &expected, Tolerance::EXACT);
        }
    }
}

#[test]
fn a_given_length_is_that_of_every_call() {
    let x = x(Dtype::Float32);
    let starts = Array::from_slice(&[3_i32, 3], &[2]);
    for scaling in [dynamic(), long()] {
        let module = RopeBuilder::new(16).scaling(scaling.clone()).sequence_length(64);
        let module = build(module);
        let expected = scaled(&x, 3, &scaling, 64);
        let at = module.forward_at(&x, 3).unwrap();
        assert_close(&format!("{scaling:?} at 3"), &at, &expected, Tolerance::EXACT);
        let per_row = module.forward_at(&x, &starts).unwrap();
        assert_close(&format!("{scaling:?} per row"), &per_row, &expected, Tolerance::EXACT);
    }
}

#[test]
fn rows_apart_have_no_length_to_follow() {
    let module = build(RopeBuilder::new(16).scaling(dynamic()));
    let starts = Array::from_slice(&[3_i32, 0], &[2]);
    let refusal = module.forward_at(&x(Dtype::Float32), &starts).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "[Rope] offset must be one number unless sequence_length is set but got one for each row"
    );
}

#[test]
fn the_function_refuses_for_the_module() {
    let module = build(RopeBuilder::new(16).scaling(dynamic()));
    let refusal = module.forward_at(&Array::from_f32(1.0), 0).unwrap_err();
    assert!(refusal.to_string().starts_with("[rope] x must have shape"), "{refusal}");
}

#[test]
fn the_builder_refuses_what_cannot_be() {
    assert!(matches!(Rope::new(7), Err(Error::Value { argument: "dims", .. })));
    for (builder, at_fault) in [
        (RopeBuilder::new(8).base(f32::NAN), "base"),
        (RopeBuilder::new(8).scaling(RopeScaling::Linear { factor: 0.0 }), "factor"),
        (RopeBuilder::new(8).sequence_length(0), "sequence_length"),
    ] {
        let refusal = builder.build().unwrap_err();
        assert!(
            matches!(refusal, Error::Value { argument, .. } if argument == at_fault),
            "{OP}: {refusal}"
        );
    }
}

use mlx_primitives::{Result, attention::*};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, ModuleParameters as _},
};

use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    modules::assert_module,
    sample::{normal, strided},
    tensor::Tensor,
};

const F32: Tolerance = Tolerance { rtol: 1e-5, atol: 1e-6 };

/// As the paper words it: of a power of two, a geometric sequence that starts at its own ratio; of any other number,
/// those of the power below, then the missing ones from every other of twice that power.
fn slopes_of(heads: usize) -> Vec<f64> {
    let sequence = |n: usize| {
        let ratio = 2_f64.powf(-8.0 / n as f64);
        (1..=n).map(|place| ratio.powi(place as i32)).collect::<Vec<_>>()
    };
    if heads.is_power_of_two() {
        return sequence(heads);
    }
    let below = heads.next_power_of_two() / 2;
    let between = sequence(2 * below).into_iter().step_by(2).take(heads - below);
    sequence(below).into_iter().chain(between).collect()
}

#[test]
fn slopes_are_those_of_the_paper() {
    for heads in [1_usize, 2, 3, 5, 6, 7, 8, 9, 12, 16, 20, 31, 32, 40, 112, 128] {
        let expected = Tensor::new(&[heads], slopes_of(heads));
        let got = alibi_slopes(heads as i32).unwrap();
        assert_eq!(got.dtype(), Dtype::Float32);
        assert_close(&format!("slopes of {heads}"), &got, &expected, F32);
    }
    let eight: Vec<f64> = (1..=8).map(|n| 0.5_f64.powi(n)).collect();
    assert_eq!(Tensor::of(&alibi_slopes(8).unwrap()).values, eight, "printed in the paper");
}

#[test]
fn slopes_of_no_heads_are_refused() {
    for heads in [0, -1, i32::MIN, 65537, i32::MAX] {
        assert_eq!(
            alibi_slopes(heads).unwrap_err().to_string(),
            format!("[alibi_slopes] num_heads must be from 1 to 65536 but got {heads}")
        );
    }
}

/// `slopes` by any leading axes; positions of queries and keys as they are.
fn alibi_by_definition(slopes: &Tensor, queries: usize, keys: usize, offset: i64) -> Tensor {
    let shape = [&slopes.shape[..], &[queries, keys]].concat();
    Tensor::from_fn(&shape, |index| {
        let (leading, at) = index.split_at(index.len() - 2);
        let distance = (offset + at[0] as i64 - at[1] as i64).abs();
        -slopes.at(leading) * distance as f64
    })
}

#[test]
fn alibi_falls_with_the_distance() {
    for (queries, keys, offset) in [
        (1, 1, None),
        (5, 5, None),
        (3, 7, None),
        (7, 3, None),
        (1, 65, None),
        (4, 6, Some(0)),
        (4, 6, Some(100)),
        (4, 6, Some(-3)),
        (2, 3, Some(1 << 24)),
        (0, 3, None),
        (3, 0, None),
    ] {
        for shape in [&[3][..], &[2, 3], &[0], &[0, 4]] {
            let slopes = normal(1, shape, Dtype::Float32);
            let expected = alibi_by_definition(
                &Tensor::of(&slopes),
                queries,
                keys,
                offset.map_or(keys as i64 - queries as i64, i64::from),
            );
            let options = AlibiBiasOptions { offset };
            let got = alibi_bias(&slopes, queries as i32, keys as i32, options).unwrap();
            assert_close(&format!("{queries} {keys} {offset:?} {shape:?}"), &got, &expected, F32);
        }
    }
}

#[test]
fn alibi_takes_strided_slopes_of_any_dtype() {
    for dtype in FLOATING {
        let slopes = strided(&normal(2, &[2, 5], dtype));
        let expected = alibi_by_definition(&Tensor::of(&slopes), 3, 4, 1);
        let got = alibi_bias(&slopes, 3, 4, AlibiBiasOptions::default()).unwrap();
        assert_eq!(got.dtype(), Dtype::Float32);
        assert_close(&format!("{dtype:?}"), &got, &expected, F32);
    }
}

#[test]
fn alibi_has_a_gradient() {
    let slopes = Tensor::of(&normal(3, &[2, 3], Dtype::Float32));
    assert_gradients(
        "alibi_bias",
        &[slopes],
        |inputs| alibi_by_definition(&inputs[0], 4, 5, 1),
        |inputs| alibi_bias(&inputs[0], 4, 5, AlibiBiasOptions::default()),
    );
}

#[test]
fn bad_arguments_of_alibi_are_named() {
    let slopes = Array::ones::<f32>(&[4]).unwrap();
    let call = |slopes: &Array, queries, keys, offset| {
        alibi_bias(slopes, queries, keys, AlibiBiasOptions { offset }).unwrap_err().to_string()
    };
    let of_shape = |shape: &[i32]| call(&Array::ones::<f32>(shape).unwrap(), 2, 2, None);
    let form = "[alibi_bias] slopes must have shape [H] but got";
    assert_eq!(of_shape(&[]), format!("{form} []"));
    assert_eq!(of_shape(&[1, 2, 3]), format!("{form} [1, 2, 3]"));
    let ints = slopes.as_dtype(Dtype::Int32).unwrap();
    assert!(call(&ints, 2, 2, None).starts_with("[alibi_bias] slopes must have dtype"));
    let length = "must be from 0 to 16777216 but got";
    assert_eq!(call(&slopes, -1, 2, None), format!("[alibi_bias] query_length {length} -1"));
    let most = i32::MAX;
    assert_eq!(call(&slopes, 2, most, None), format!("[alibi_bias] key_length {length} {most}"));
    assert_eq!(
        call(&slopes, 2, 2, Some(-16777217)),
        "[alibi_bias] offset must be from -16777216 to 16777216 but got -16777217"
    );
}

/// The first distance of each shared bucket of one direction, for 16 buckets up to a distance of 128, by hand:
/// `8 · 16^(k / 8)`, rounded up.
const FIRST: [i64; 8] = [8, 12, 16, 23, 32, 46, 64, 91];

#[test]
fn buckets_of_t5_are_as_counted_by_hand() {
    let of_distance = |d: i64| {
        if d < 8 { d } else { 7 + FIRST.iter().filter(|&&first| first <= d).count() as i64 }
    };
    let positions: Vec<_> = (-300..=300).collect();
    let expected: Vec<f64> = positions
        .iter()
        .map(|&r: &i32| of_distance(i64::from(r).abs()) as f64 + if r > 0 { 16.0 } else { 0.0 })
        .collect();
    let positions = Array::from_slice(&positions, &[601]);
    let got = relative_position_bucket(positions, RelativePositionBucketOptions::default());
    let got = got.unwrap();
    assert_eq!(got.dtype(), Dtype::Int32);
    assert_eq!(Tensor::of(&got).values, expected);
}

/// The bucket by powers instead of logarithms: the most steps `k` with `e (m / e)^(k / (n − e)) <= d`.
fn bucket(r: i64, options: RelativePositionBucketOptions) -> i64 {
    let RelativePositionBucketOptions { bidirectional, num_buckets, max_distance } = options;
    let n = i64::from(num_buckets) / if bidirectional { 2 } else { 1 };
    let base = if bidirectional && r > 0 { n } else { 0 };
    let d = if bidirectional { r.abs() } else { (-r).max(0) };
    let e = n / 2;
    if d < e {
        return base + d;
    }
    let first = |k: i64| {
        let ratio = f64::from(max_distance) / e as f64;
        e as f64 * ratio.powf(k as f64 / (n - e) as f64) * (1.0 - 1e-12)
    };
    let past = (1..n - e).take_while(|&k| first(k) <= d as f64).count() as i64;
    base + e + past
}

#[test]
fn any_buckets_follow_the_formula() {
    for (bidirectional, num_buckets, max_distance) in [
        (true, 32, 128),
        (false, 32, 128),
        (true, 4, 2),
        (false, 2, 2),
        (false, 3, 50),
        (true, 6, 7),
        (true, 64, 1000),
        (false, 33, 777),
        (false, 320, 800),
        (false, 32, 1 << 20),
    ] {
        let options = RelativePositionBucketOptions { bidirectional, num_buckets, max_distance };
        let far = 2 * i64::from(max_distance).min(2000);
        let positions: Vec<i32> = (-far..=far).map(|r| r as i32).collect();
        let expected: Vec<f64> =
            positions.iter().map(|&r| bucket(i64::from(r), options) as f64).collect();
        let positions = Array::from_slice(&positions, &[positions.len() as i32]);
        let got = relative_position_bucket(positions, options).unwrap();
        assert_eq!(Tensor::of(&got).values, expected, "{options:?}");
    }
}

#[test]
fn the_farthest_positions_share_the_last_buckets() {
    let ends = Array::from_slice(&[i64::MIN, i64::MAX, i32::MIN.into(), i32::MAX.into()], &[2, 2]);
    let of = |bidirectional| {
        let options = RelativePositionBucketOptions { bidirectional, ..Default::default() };
        Tensor::of(&relative_position_bucket(&ends, options).unwrap()).values
    };
    assert_eq!(of(true), [15.0, 31.0, 15.0, 31.0]);
    assert_eq!(of(false), [31.0, 0.0, 31.0, 0.0]);
    for (dtype, expected) in [(Dtype::Uint8, 29.0), (Dtype::Int8, 0.0), (Dtype::Uint32, 29.0)] {
        let position = Array::from_int(63).as_dtype(dtype).unwrap();
        let bidirectional = expected > 0.0;
        let options = RelativePositionBucketOptions { bidirectional, ..Default::default() };
        let got = relative_position_bucket(position, options).unwrap();
        assert_eq!(Tensor::of(&got).values, [expected], "{dtype:?}");
    }
    let none = Array::zeros::<i32>(&[3, 0]).unwrap();
    let got = relative_position_bucket(none, RelativePositionBucketOptions::default()).unwrap();
    assert_eq!((got.shape(), got.dtype()), (&[3, 0][..], Dtype::Int32));
}

#[test]
fn bad_buckets_are_named() {
    let call = |bidirectional, num_buckets, max_distance| {
        let options = RelativePositionBucketOptions { bidirectional, num_buckets, max_distance };
        relative_position_bucket(Array::from_int(1), options).unwrap_err().to_string()
    };
    let form = "[relative_position_bucket]";
    let even = "num_buckets must be even and at least 4 but got";
    for buckets in [2, 5, 0, -4, i32::MIN] {
        assert_eq!(call(true, buckets, 128), format!("{form} {even} {buckets}"));
    }
    assert_eq!(call(false, 1, 128), format!("{form} num_buckets must be at least 2 but got 1"));
    let distance = "max_distance must be above 8 and at most 1048576 but got";
    for far in [8, -1, (1 << 20) + 1] {
        assert_eq!(call(true, 32, far), format!("{form} {distance} {far}"));
    }
    let floats = Array::from_f32(1.0);
    let options = RelativePositionBucketOptions::default();
    let error = relative_position_bucket(floats, options).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{form} relative_positions must have dtype")), "{error}");
}

/// `[buckets, H]` to `[H, S_q, S_kv]`.
fn bias_by_definition(
    table: &Tensor,
    options: RelativePositionBucketOptions,
    [queries, keys]: [usize; 2],
    offset: i64,
) -> Tensor {
    Tensor::from_fn(&[table.shape[1], queries, keys], |index| {
        let r = index[2] as i64 - offset - index[1] as i64;
        table.at(&[bucket(r, options) as usize, index[0]])
    })
}

fn module(heads: i32, bidirectional: bool) -> RelativePositionBias {
    let builder = RelativePositionBiasBuilder::new(heads).bidirectional(bidirectional);
    builder.num_buckets(8).max_distance(20).build().unwrap()
}

#[test]
fn the_module_looks_up_what_it_learned() {
    for bidirectional in [true, false] {
        let mut module = module(3, bidirectional);
        assert_eq!(module.weight.shape(), [8, 3]);
        let table = Tensor::of(&module.weight);
        for (queries, keys, offset) in [
            (1, 1, None),
            (4, 4, None),
            (3, 30, None),
            (30, 3, None),
            (1, 9, None),
            (0, 4, None),
            (4, 0, None),
            (5, 6, Some(0)),
            (5, 6, Some(-7)),
            (2, 6, Some(1 << 20)),
        ] {
            let at = offset.map_or(keys - queries, i64::from);
            let expected =
                bias_by_definition(&table, module.options(), [queries as _, keys as _], at);
            let (query_length, key_length) = (queries as i32, keys as i32);
            let input = RelativePositionBiasInput { query_length, key_length, offset };
            let got = module.forward(input).unwrap();
            assert_close(&format!("{queries} {keys}"), &got, &expected, Tolerance::EXACT);
        }
    }
}

#[test]
fn the_gradient_reaches_the_table() {
    let mut module = module(2, true);
    let options = module.options();
    let table = Tensor::of(&module.weight);
    assert_gradients(
        "RelativePositionBias",
        &[table],
        |inputs| bias_by_definition(&inputs[0], options, [5, 7], 2),
        |inputs| {
            let mut module = module.clone();
            module.weight.value = inputs[0].clone();
            Ok(module.forward((5, 7))?)
        },
    );
    module.freeze_parameters(true);
    assert!(module.trainable_parameters().flatten().is_empty());
}

/// Attends from `[B, S, H, D]` to itself with a bias that is learned.
#[derive(Debug, Clone, ModuleParameters)]
struct Attends {
    #[param]
    position: RelativePositionBias,
}

impl Module<&Array> for Attends {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let bias = self.position.forward((x.dim(1), x.dim(1)))?;
        let options = FlashAttentionOptions { mask: Some(&bias), ..Default::default() };
        Ok(flash_attention(x, x, x, options)?)
    }

    fn training_mode(&mut self, _: bool) {}
}

#[test]
fn the_module_trains_in_attention() {
    let input = normal(5, &[2, 6, 3, 8], Dtype::Float32);
    assert_module(Attends { position: module(3, false) }, &input, &["position.weight"]);
}

#[test]
fn the_module_refuses_what_cannot_be() {
    let refused = |builder: RelativePositionBiasBuilder| builder.build().unwrap_err().to_string();
    let of = RelativePositionBiasBuilder::new;
    let form = "[RelativePositionBias]";
    assert_eq!(refused(of(0)), format!("{form} num_heads must be at least 1 but got 0"));
    assert!(refused(of(2).num_buckets(7)).starts_with(&format!("{form} num_buckets must be even")));
    assert!(refused(of(2).max_distance(8)).starts_with(&format!("{form} max_distance must be")));
    assert!(RelativePositionBias::new(-1).is_err());
    let mut module = module(2, true);
    let mut call = |lengths: (i32, i32)| module.forward(lengths).unwrap_err().what().to_owned();
    assert!(call((-1, 2)).starts_with(&format!("{form} query_length must be from 0")));
    assert!(call((2, -1)).starts_with(&format!("{form} key_length must be from 0")));
    let far = RelativePositionBiasInput { query_length: 1, key_length: 1, offset: Some(i32::MIN) };
    let error = module.forward(far).unwrap_err();
    assert!(error.what().starts_with(&format!("{form} offset must be from")));
    module.weight.value = Array::ones::<f32>(&[8, 3]).unwrap();
    let error = module.forward((1, 1)).unwrap_err();
    assert_eq!(error.what(), format!("{form} weight must have shape [8, 2] but got [8, 3]"));
}

//! Every documented error of attention.

use mlx_primitives::{
    Backend, Dispatch, Layout,
    attention::{
        AttentionDropout, FlashAttentionOptions as Options, Segments, Window, flash_attention,
        flash_attention_with_lse,
    },
};
use mlx_rs::{Array, Dtype, ops::indexing::TryIndexOp, random};

pub(crate) fn zeros(shape: &[i32]) -> Array {
    Array::zeros::<f32>(shape).unwrap()
}

#[test]
fn shapes_that_disagree_are_errors_that_name_the_argument() {
    let call = |queries: &[i32], keys: &[i32], values: &[i32]| {
        let [queries, keys, values] = [queries, keys, values].map(zeros);
        flash_attention(queries, keys, values, Options::default()).unwrap_err().to_string()
    };
    let (q, k) = ([2, 5, 4, 8], [2, 7, 2, 8]);
    assert_eq!(
        call(&[5, 4, 8], &k, &k),
        "[flash_attention] queries must have shape [B, S_q, H, D] but got [5, 4, 8]"
    );
    assert_eq!(
        call(&[2, 5, 4, 0], &k, &k),
        "[flash_attention] queries must have shape [..., D] with D at least 1 but got [2, 5, 4, 0]"
    );
    let keys_of = "[flash_attention] keys must have shape [2, S_kv, H_kv, 8] but got";
    assert_eq!(call(&q, &[7, 2, 8], &k), format!("{keys_of} [7, 2, 8]"));
    assert_eq!(call(&q, &[3, 7, 2, 8], &k), format!("{keys_of} [3, 7, 2, 8]"));
    assert_eq!(call(&q, &[2, 7, 2, 9], &k), format!("{keys_of} [2, 7, 2, 9]"));
    let values_of = "[flash_attention] values must have shape [2, 7, 2, D_v] but got";
    for values in [[1, 7, 2, 8], [2, 6, 2, 8], [2, 7, 4, 8]] {
        assert_eq!(call(&q, &k, &values), format!("{values_of} {values:?}"));
    }
    for kv_heads in [3, 8, 0] {
        assert_eq!(
            call(&q, &[2, 7, kv_heads, 8], &[2, 7, kv_heads, 8]),
            format!(
                "[flash_attention] queries must have a multiple of H_kv = {kv_heads} heads but got 4"
            )
        );
    }
}

#[test]
fn shapes_are_spelled_in_the_layout() {
    let options = Options { layout: Layout::Bhsd, ..Default::default() };
    let (queries, keys) = (zeros(&[2, 4, 5, 8]), zeros(&[2, 2, 7, 9]));
    assert_eq!(
        flash_attention(&queries, &keys, &keys, options).unwrap_err().to_string(),
        "[flash_attention] keys must have shape [2, H_kv, S_kv, 8] but got [2, 2, 7, 9]"
    );
}

#[test]
fn bad_dtypes_masks_and_scales_are_errors_that_name_the_argument() {
    let (q, k) = (zeros(&[2, 5, 4, 8]), zeros(&[2, 7, 2, 8]));
    let half = k.as_dtype(Dtype::Float16).unwrap();
    let ints = q.as_dtype(Dtype::Int32).unwrap();
    let call = |queries: &Array, keys: &Array, values: &Array, options: Options| {
        flash_attention(queries, keys, values, options).unwrap_err().to_string()
    };
    let none = Options::default;
    assert!(call(&ints, &k, &k, none()).starts_with("[flash_attention] queries must have dtype"));
    let half_keys = "[flash_attention] keys must have dtype Float32 but got Float16";
    assert_eq!(call(&q, &half, &k, none()), half_keys);
    let half_values = "[flash_attention] values must have dtype Float32 but got Float16";
    assert_eq!(call(&q, &k, &half, none()), half_values);

    let with_mask = |mask: &Array| call(&q, &k, &k, Options { mask: Some(mask), ..none() });
    assert_eq!(
        with_mask(&Array::from_int(1)),
        "[flash_attention] mask must have dtype Bool or Float32 or Float16 or Bfloat16 but got Int32"
    );
    for shape in [&[5, 6][..], &[7, 5], &[2, 1, 7], &[1, 2, 4, 5, 7]] {
        assert_eq!(
            with_mask(&zeros(shape)),
            format!(
                "[flash_attention] mask must have shape broadcastable to [2, 4, 5, 7] but got {shape:?}"
            )
        );
    }
    for scale in [f32::NAN, f32::INFINITY] {
        assert_eq!(
            call(&q, &k, &k, Options { scale: Some(scale), ..none() }),
            format!("[flash_attention] scale must be finite but got {scale}")
        );
    }
}

#[test]
fn bad_options_are_errors_that_name_them() {
    let (q, k) = (zeros(&[2, 5, 4, 8]), zeros(&[2, 7, 2, 8]));
    let call = |options: Options| {
        let error = flash_attention(&q, &k, &k, options.clone()).unwrap_err().to_string();
        let with_lse = flash_attention_with_lse(&q, &k, &k, options).unwrap_err().to_string();
        assert_eq!(error, with_lse);
        error
    };
    let none = Options::default;
    for soft_cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert_eq!(
            call(Options { soft_cap: Some(soft_cap), ..none() }),
            format!("[flash_attention] soft_cap must be finite and above 0 but got {soft_cap}")
        );
    }
    let window = |left, right| call(Options { window: Window { left, right }, ..none() });
    let left = "[flash_attention] window.left must be at least 0 but got -1";
    assert_eq!(window(Some(-1), None), left);
    let right = "[flash_attention] window.right must be at least 0 but got -2147483648";
    assert_eq!(window(Some(0), Some(i32::MIN)), right);

    let slopes = |slopes: &Array| call(Options { alibi_slopes: Some(slopes), ..none() });
    let of_slopes = "[flash_attention] alibi_slopes must have";
    assert_eq!(slopes(&zeros(&[3])), format!("{of_slopes} shape [4] but got [3]"));
    assert_eq!(slopes(&zeros(&[])), format!("{of_slopes} shape [4] but got []"));
    assert_eq!(slopes(&zeros(&[1, 4])), format!("{of_slopes} shape [2, 4] but got [1, 4]"));
    let ints = Array::from_slice(&[1_i32; 4], &[4]);
    let floats = "Float32 or Float16 or Bfloat16 but got Int32";
    assert_eq!(slopes(&ints), format!("{of_slopes} dtype {floats}"));

    let sinks = |sinks: &Array| call(Options { sinks: Some(sinks), ..none() });
    assert_eq!(sinks(&zeros(&[2])), "[flash_attention] sinks must have shape [4] but got [2]");
    assert_eq!(sinks(&ints), format!("[flash_attention] sinks must have dtype {floats}"));
}

#[test]
fn bad_dropout_is_an_error_that_names_it() {
    let x = zeros(&[1, 3, 2, 8]);
    let call = |probability, key: &Array| {
        let dropout = Some(AttentionDropout { probability, key });
        let options = Options { dropout, ..Default::default() };
        flash_attention(&x, &x, &x, options).unwrap_err().to_string()
    };
    let key = random::key(1).unwrap();
    for probability in [1.0, -0.1, f32::NAN] {
        let expected = "[flash_attention] dropout.probability must be at least 0 and below 1";
        assert_eq!(call(probability, &key), format!("{expected} but got {probability}"));
    }
    assert_eq!(
        call(0.0, &key.reshape(&[1, 2]).unwrap()),
        "[flash_attention] dropout.key must have shape [2] but got [1, 2]"
    );
    assert_eq!(
        call(0.5, &zeros(&[2])),
        "[flash_attention] dropout.key must have dtype Uint32 but got Float32"
    );
}

#[test]
fn bad_segments_are_errors_that_name_them() {
    let call = |batch: i32, queries: &Array, keys: &Array| {
        let x = zeros(&[batch, 3, 2, 8]);
        let segments = Some(Segments { queries, keys });
        let options = Options { segments, ..Default::default() };
        flash_attention(&x, &x, &x, options).unwrap_err().to_string()
    };
    let bounds = Array::from_slice(&[0_i32, 3], &[2]);
    let of_queries = "[flash_attention] segments.queries must have";
    assert_eq!(call(1, &zeros(&[2]), &bounds), format!("{of_queries} dtype Int32 but got Float32"));
    let square = bounds.reshape(&[2, 1]).unwrap();
    assert_eq!(call(1, &square, &bounds), format!("{of_queries} shape [N + 1] but got [2, 1]"));
    let empty = bounds.try_index(..0).unwrap();
    assert_eq!(
        call(1, &empty, &bounds),
        "[flash_attention] segments.queries must have at least one number but got 0"
    );
    let of_keys = "[flash_attention] segments.keys must have";
    let longs = bounds.as_dtype(Dtype::Int64).unwrap();
    assert_eq!(call(1, &bounds, &longs), format!("{of_keys} dtype Int32 but got Int64"));
    let one = bounds.try_index(..1).unwrap();
    assert_eq!(call(1, &bounds, &one), format!("{of_keys} shape [2] but got [1]"));
    assert_eq!(
        call(2, &bounds, &bounds),
        "[flash_attention] queries must have a batch of 1 with segments but got 2"
    );
}

#[test]
fn a_backend_that_cannot_serve_says_why() {
    let x = zeros(&[1, 3, 2, 8]).as_dtype(Dtype::Bfloat16).unwrap();
    let (floats, key) = (zeros(&[2]), random::key(1).unwrap());
    let dropout = Some(AttentionDropout { probability: 0.5, key: &key });
    let none = || Options { dispatch: Dispatch::Only(Backend::Builtin), ..Default::default() };
    let by_mlx = "[flash_attention] backend builtin is unavailable: MLX's fused attention";
    for (options, reason) in [
        (Options { soft_cap: Some(1.0), ..none() }, "has no soft cap"),
        (Options { dropout, ..none() }, "has no dropout"),
        (Options { alibi_slopes: Some(&floats), ..none() }, "would round distances to the dtype"),
        (Options { sinks: Some(&floats), ..none() }, "takes sinks of the dtype of the queries"),
    ] {
        let error = flash_attention(&x, &x, &x, options).unwrap_err().to_string();
        assert_eq!(error, format!("{by_mlx} {reason}"));
    }
    let error = flash_attention_with_lse(&x, &x, &x, none()).unwrap_err().to_string();
    assert_eq!(error, format!("{by_mlx} gives no log-sum-exp"));
}

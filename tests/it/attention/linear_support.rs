//! What the tests of every linear attention share: shapes, calls in both layouts, and the ways a call may be cut.

use mlx_primitives::{Layout, Result, attention::LinearAttentionState};
use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp},
};

use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    sample::{normal, strided},
    tensor::Tensor,
};

/// Batch, heads, kv_heads, query_length, key_length, size, value_size.
pub(crate) const SHAPES: &[[i32; 7]] = &[
    [1, 1, 1, 1, 1, 1, 1],
    [0, 2, 2, 3, 3, 8, 8],
    [1, 0, 2, 3, 3, 8, 8],
    [1, 0, 0, 3, 3, 8, 8],
    [1, 2, 2, 0, 3, 8, 8],
    [1, 2, 1, 3, 0, 8, 8],
    [1, 2, 2, 3, 3, 8, 0],
    [2, 3, 3, 7, 7, 8, 5],
    [1, 2, 2, 63, 63, 16, 32],
    [1, 2, 1, 65, 65, 32, 16],
    [2, 4, 2, 5, 9, 8, 8],
    [2, 4, 1, 9, 5, 8, 8],
    [1, 2, 2, 1, 33, 64, 64],
    [1, 2, 2, 33, 1, 64, 64],
];

pub(crate) type Inputs = [Array; 3];

pub(crate) fn inputs([b, h, h_kv, s_q, s_kv, d, d_v]: [i32; 7], dtype: Dtype) -> Inputs {
    [
        normal(1, &[b, s_q, h, d], dtype),
        normal(2, &[b, s_kv, h_kv, d], dtype),
        normal(3, &[b, s_kv, h_kv, d_v], dtype),
    ]
}

pub(crate) fn tensors(inputs: &Inputs) -> [Tensor; 3] {
    inputs.each_ref().map(Tensor::of)
}

fn swap(layout: Layout, array: &Array) -> Array {
    match layout {
        Layout::Bshd => array.clone(),
        Layout::Bhsd => array.swap_axes(1, 2).unwrap(),
    }
}

/// Checks shapes, dtypes, layouts and strides against an oracle, causal or not.
pub(crate) fn check_all(
    op: &str,
    oracle: impl Fn([&Tensor; 3], bool) -> Tensor,
    run: impl Fn(&Inputs, Layout, bool) -> Result<Array>,
) {
    check_all_as(op, op, oracle, run);
}

/// The same with the tolerance of the operation `like`, of which `op` is made.
pub(crate) fn check_all_as(
    like: &str,
    op: &str,
    oracle: impl Fn([&Tensor; 3], bool) -> Tensor,
    run: impl Fn(&Inputs, Layout, bool) -> Result<Array>,
) {
    for (&shape, dtype) in SHAPES.iter().flat_map(|s| FLOATING.map(|dtype| (s, dtype))) {
        let inputs = inputs(shape, dtype);
        for causal in [false, true] {
            let expected = oracle(tensors(&inputs).each_ref(), causal);
            for layout in [Layout::Bshd, Layout::Bhsd] {
                let what = format!("{op} {shape:?} {dtype:?} {layout:?} causal: {causal}");
                let views = inputs.each_ref().map(|array| swap(layout, array));
                let y = run(&views, layout, causal).unwrap();
                assert_eq!(y.dtype(), dtype, "{what}");
                assert_close(&what, &swap(layout, &y), &expected, Tolerance::of(like, dtype));
            }
            if inputs.iter().all(|array| array.size() > 0) {
                let apart = inputs.each_ref().map(strided);
                let y = run(&apart, Layout::Bshd, causal).unwrap();
                assert_close(&format!("{op} strided"), &y, &expected, Tolerance::of(like, dtype));
            }
        }
    }
}

/// Runs a long sequence piece by piece, `run(piece, state, offset)`, and expects what one call gives.
pub(crate) fn check_pieces(
    op: &str,
    pieces: &[i32],
    whole: impl Fn(&Inputs) -> Array,
    run: impl Fn(&Inputs, Option<&LinearAttentionState>, i32) -> (Array, LinearAttentionState),
) {
    let length = pieces.iter().sum();
    let inputs = inputs([2, 4, 2, length, length, 8, 5], Dtype::Float32);
    let (mut state, mut at, mut parts) = (None, 0, Vec::new());
    for &piece in pieces {
        let cut = inputs.each_ref().map(|x| x.try_index((.., at..at + piece)).unwrap());
        let (y, next) = run(&cut, state.as_ref(), at);
        parts.push(y);
        state = Some(next);
        at += piece;
    }
    let expected = Tensor::of(&whole(&inputs));
    let got = concatenate(&parts, 1).unwrap();
    assert_close(
        &format!("{op} in {pieces:?}"),
        &got,
        &expected,
        Tolerance::of(op, Dtype::Float32),
    );
}

/// The message of a refusal.
pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.unwrap_err().to_string()
}

pub(crate) fn zeros(shape: &[i32]) -> Array {
    Array::zeros::<f32>(shape).unwrap()
}

/// What every function of queries, keys and values refuses.
pub(crate) fn check_refusals(op: &str, run: impl Fn([&Array; 3]) -> Result<Array>) {
    let (q, k) = (zeros(&[2, 5, 4, 8]), zeros(&[2, 7, 2, 8]));
    let of = |q: &[i32], k: &[i32], v: &[i32]| refusal(run([&zeros(q), &zeros(k), &zeros(v)]));
    let (qs, ks) = (q.shape(), k.shape());
    assert_eq!(
        of(&[5, 4, 8], ks, ks),
        format!("[{op}] queries must have shape [B, S_q, H, D] but got [5, 4, 8]")
    );
    assert_eq!(
        of(&[2, 5, 4, 0], &[2, 7, 2, 0], ks),
        format!("[{op}] queries must have shape [..., D] with D at least 1 but got [2, 5, 4, 0]")
    );
    for keys in [[3, 7, 2, 8], [2, 7, 2, 9]] {
        assert_eq!(
            of(qs, &keys, ks),
            format!("[{op}] keys must have shape [2, S_kv, H_kv, 8] but got {keys:?}")
        );
    }
    for values in [[1, 7, 2, 8], [2, 6, 2, 8], [2, 7, 4, 8]] {
        assert_eq!(
            of(qs, ks, &values),
            format!("[{op}] values must have shape [2, 7, 2, D_v] but got {values:?}")
        );
    }
    let heads = format!("[{op}] queries must have a multiple of H_kv = 3 heads but got 4");
    assert_eq!(of(qs, &[2, 7, 3, 8], &[2, 7, 3, 8]), heads);
    let half = k.as_dtype(Dtype::Float16).unwrap();
    let other = "must have dtype Float32 but got Float16";
    assert_eq!(refusal(run([&q, &half, &k])), format!("[{op}] keys {other}"));
    assert_eq!(refusal(run([&q, &k, &half])), format!("[{op}] values {other}"));
    let ints = q.as_dtype(Dtype::Int32).unwrap();
    assert!(refusal(run([&ints, &k, &k])).starts_with(&format!("[{op}] queries must have dtype")));
}

//! Matrix products by `metal/common/tile.metal`, on whatever device is there.

use mlx_primitives::{
    dispatch::{Context, Target},
    kernel::{Argument, Call, Constant, File, Kernel, Launch, Plan},
};
use mlx_rs::{Array, Dtype};

use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    host,
    sample::normal,
    tensor::Tensor,
};

const TILE: File = File::new("common/tile.metal", include_str!("../../metal/common/tile.metal"));

static MATMUL: Kernel = Kernel {
    name: "matmul",
    inputs: &[Argument::of("T", "a", &["O", "R"]), Argument::of("T", "b", &["P", "Q"])],
    outputs: &[Argument::of("T", "visited", &["M", "N"]), Argument::of("T", "stored", &["M", "N"])],
    constants: &["A_TRANSPOSED", "B_TRANSPOSED"],
    fragments: &[TILE],
    file: File::new("tests/kernels/matmul.metal", include_str!("../kernels/matmul.metal")),
};

/// Rows of `a`, columns of `a`, columns of the product: whole tiles, and some more or less.
const SIZES: [[i32; 3]; 6] =
    [[32, 32, 32], [1, 1, 1], [2, 3, 2], [16, 40, 8], [33, 7, 31], [48, 65, 47]];

/// `a` is `[M, K]` and `b` `[K, N]`, or the transpose where `transposed`.
fn matmul(a: &Array, b: &Array, transposed: [bool; 2]) -> Vec<Array> {
    let rows = a.dim(i32::from(transposed[0]));
    let columns = b.dim(i32::from(!transposed[1]));
    let groups = |size: i32| size.unsigned_abs().div_ceil(32);
    let plan = Plan {
        constants: transposed.map(Constant::Bool).to_vec(),
        extents: vec![("M", rows), ("N", columns)],
        launch: Launch {
            groups: [groups(columns), groups(rows), 1],
            group: [128, 1, 1],
            threadgroup_bytes: if a.dtype() == Dtype::Float32 { 15360 } else { 7680 },
        },
    };
    let call = Call::new(&MATMUL, &[a, b], plan).unwrap();
    // SAFETY: the inner sizes agree, which is all that the kernel takes for granted: it checks the end of its arrays,
    // groups cover the product, and each element has one lane.
    unsafe { call.run_unchecked() }.unwrap()
}

fn oracle(a: &Tensor, b: &Tensor) -> Tensor {
    let (depth, columns) = (a.shape[1], b.shape[1]);
    Tensor::from_fn(&[a.shape[0], columns], |at| {
        (0..depth).map(|k| a.at(&[at[0], k]) * b.at(&[k, at[1]])).sum()
    })
}

/// A GPU may take a float in two parts: what no part can hold has to come out whole.
#[test]
fn values_at_the_ends_of_floats_stay_in_their_rows() {
    if !host::install() && Context::current().unwrap().target == Target::Cpu {
        return;
    }
    let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, 1e-36, -0.0, 3.0, 1.0 + 1e-6];
    let mut left = vec![0.0_f32; 16 * 16];
    special.iter().enumerate().for_each(|(row, value)| left[row * 17] = *value);
    let right = (0..16 * 16).map(|i| [1.0, -2.0, 0.5][i % 3]).collect::<Vec<f32>>();
    let [left, right] = [left, right].map(|values| Array::from_slice(&values, &[16, 16]));
    let expected = oracle(&Tensor::of(&left), &Tensor::of(&right));
    for y in matmul(&left, &right, [false, false]) {
        for (got, expected) in Tensor::of(&y).values.iter().zip(&expected.values) {
            // Parts below 2^-126 are lost, times 2 at most.
            let close = (got - expected).abs() <= 1e-6 * expected.abs() + 2.4e-38;
            assert!(
                close || got == expected || got.is_nan() && expected.is_nan(),
                "{got} {expected}"
            );
        }
    }
}

/// Small enough numbers that sums are about one.
fn factor(seed: u64, shape: [i32; 2], depth: i32, dtype: Dtype) -> Array {
    let scale = Array::from_f32((depth as f32).powf(-0.25));
    let values = normal(seed, &shape, Dtype::Float32).multiply(scale).unwrap();
    values.as_dtype(dtype).unwrap()
}

#[test]
fn tiles_multiply_as_matrices_do() {
    if !host::install() && Context::current().unwrap().target == Target::Cpu {
        return;
    }
    for [rows, depth, columns] in SIZES {
        for dtype in FLOATING {
            let (a, b) =
                (factor(1, [rows, depth], depth, dtype), factor(2, [depth, columns], depth, dtype));
            let expected = oracle(&Tensor::of(&a), &Tensor::of(&b));
            for transposed in [[false, false], [false, true], [true, false]] {
                let stored = |array: &Array, swapped: bool| match swapped {
                    true => array.swap_axes(0, 1).unwrap(),
                    false => array.clone(),
                };
                let (a, b) = (stored(&a, transposed[0]), stored(&b, transposed[1]));
                for (y, how) in matmul(&a, &b, transposed).iter().zip(["visited", "stored"]) {
                    let what = format!("{rows}x{depth}x{columns} {dtype:?} {transposed:?} {how}");
                    assert_close(&what, y, &expected, Tolerance::of("matmul by tiles", dtype));
                }
            }
        }
    }
}

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

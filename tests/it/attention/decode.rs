//! Few queries over many keys: the kernel that splits the keys, and whatever else answers such calls.

use mlx_primitives::{
    Backend, Layout, Result,
    attention::{FlashAttentionOptions, Window, flash_attention_with_lse},
};
use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, full_like, indexing::IndexOp},
};

use super::row::{self, Rule};
use crate::support::{
    FLOATING,
    backends::{on_backends, with_kernels},
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    sample::{normal, strided},
    tensor::Tensor,
};

const OP: &str = "flash_attention";

/// Where keys and values lie.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// In arrays of their own.
    Own,
    /// In the middle of a longer cache, whose other slots are NaN.
    Cache,
    /// Every other number of a longer row, the others NaN.
    Strided,
}

/// Sizes as batch, heads, kv_heads, queries, keys, size, value_size.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    sizes: [i32; 7],
    place: Place,
    scale: Option<f32>,
    causal: bool,
    window: [Option<i32>; 2],
    soft_cap: Option<f32>,
    /// Of rank 1 or 2.
    alibi: Option<usize>,
    sinks: bool,
}

const fn case(name: &'static str, sizes: [i32; 7]) -> Case {
    Case {
        name,
        sizes,
        place: Place::Own,
        scale: None,
        causal: true,
        window: [None, None],
        soft_cap: None,
        alibi: None,
        sinks: false,
    }
}

const SMALL: [i32; 7] = [2, 4, 2, 3, 37, 64, 64];

const CASES: &[Case] = &[
    case("one of everything", [1, 1, 1, 1, 1, 1, 1]),
    case("an odd head", [1, 2, 1, 1, 7, 5, 3]),
    case("15 keys", [1, 2, 2, 1, 15, 64, 64]),
    case("16 keys", [1, 2, 2, 1, 16, 64, 64]),
    case("17 keys", [1, 2, 2, 1, 17, 64, 64]),
    case("63 keys", [1, 4, 1, 1, 63, 64, 64]),
    case("64 keys", [1, 4, 1, 1, 64, 64, 64]),
    case("65 keys", [1, 4, 1, 1, 65, 64, 64]),
    case("127 keys", [1, 8, 2, 1, 127, 32, 32]),
    case("two parts", [1, 2, 1, 1, 257, 32, 32]),
    case("parts of three batch rows", [3, 4, 2, 2, 400, 16, 24]),
    case("many parts", [1, 1, 1, 1, 4097, 8, 8]),
    case("head size 80", [1, 2, 2, 1, 33, 80, 80]),
    case("head size 96", [1, 2, 2, 1, 33, 96, 96]),
    case("head size 128", [1, 4, 1, 1, 70, 128, 128]),
    case("head size 256", [1, 2, 1, 2, 33, 256, 256]),
    case("narrow values", [1, 2, 1, 1, 33, 128, 64]),
    case("wide values", [1, 2, 1, 1, 33, 40, 136]),
    case("groups of 3", [2, 6, 2, 1, 20, 64, 64]),
    case("groups of 8", [1, 8, 1, 1, 33, 64, 64]),
    case("groups of 9", [1, 9, 1, 1, 33, 64, 64]),
    case("groups of 16", [1, 16, 1, 1, 33, 64, 64]),
    case("17 rows", [1, 17, 1, 1, 33, 32, 32]),
    case("2 queries", [2, 4, 2, 2, 33, 64, 64]),
    case("8 queries", [1, 4, 2, 8, 65, 64, 64]),
    case("8 queries over 3 keys", [1, 4, 2, 8, 3, 64, 64]),
    Case { causal: false, ..case("not causal", SMALL) },
    Case { place: Place::Cache, ..case("in a cache", SMALL) },
    Case { place: Place::Cache, ..case("in a cache, in parts", [1, 2, 1, 1, 300, 64, 64]) },
    Case { place: Place::Strided, ..case("strided", [1, 4, 2, 2, 37, 32, 32]) },
    Case { scale: Some(0.0), ..case("scale 0", SMALL) },
    Case { scale: Some(-0.3), ..case("negative scale", SMALL) },
    Case { window: [Some(5), None], ..case("window", SMALL) },
    Case { window: [Some(0), None], ..case("each key alone", SMALL) },
    Case { window: [Some(100), None], ..case("window in parts", [1, 2, 1, 1, 300, 16, 16]) },
    Case { window: [Some(300), None], ..case("parts of a window", [1, 2, 1, 2, 450, 16, 16]) },
    Case { causal: false, window: [Some(3), Some(1)], ..case("window both ways", SMALL) },
    Case { soft_cap: Some(0.7), ..case("soft cap", SMALL) },
    Case { alibi: Some(1), ..case("ALiBi by head", SMALL) },
    Case { alibi: Some(2), causal: false, ..case("ALiBi by batch row", SMALL) },
    Case { sinks: true, ..case("sinks", SMALL) },
    Case { sinks: true, ..case("sinks without keys", [1, 4, 2, 8, 3, 64, 64]) },
    Case { sinks: true, ..case("sinks beside parts", [2, 4, 2, 2, 300, 32, 32]) },
    Case {
        place: Place::Cache,
        window: [Some(270), None],
        soft_cap: Some(2.0),
        alibi: Some(2),
        sinks: true,
        ..case("everything, in parts", [1, 6, 2, 3, 290, 32, 16])
    },
];

/// `[B, S, H, D]`.
fn placed(array: &Array, place: Place) -> Array {
    match place {
        Place::Own => array.clone(),
        Place::Strided => strided(array),
        Place::Cache => {
            let unwritten = full_like(array, Array::from_f32(f32::NAN), array.dtype()).unwrap();
            let buffer = concatenate(&[&unwritten, array, &unwritten], 1).unwrap();
            buffer.eval().unwrap();
            let length = array.dim(1);
            buffer.index((.., length..2 * length, .., ..))
        }
    }
}

/// As a cache of this layout holds it.
fn laid_out(array: &Array, layout: Layout, place: Place) -> Array {
    match layout {
        Layout::Bshd => placed(array, place),
        Layout::Bhsd => {
            let placed = placed(&array.swap_axes(1, 2).unwrap().contiguous().unwrap(), Place::Own);
            if place == Place::Own {
                return placed;
            }
            // The cache is cut along its third axis here.
            let nan = full_like(&placed, Array::from_f32(f32::NAN), placed.dtype()).unwrap();
            let buffer = concatenate(&[&nan, &placed, &nan], 2).unwrap();
            let length = placed.dim(2);
            buffer.index((.., .., length..2 * length, ..))
        }
    }
}

struct Inputs {
    queries: Array,
    keys: Array,
    values: Array,
    slopes: Option<Array>,
    sinks: Option<Array>,
}

impl Case {
    fn inputs(&self, dtype: Dtype) -> Inputs {
        let [b, h, h_kv, s_q, s_kv, d, d_v] = self.sizes;
        let slopes = self.alibi.map(|rank| {
            let shape = [b, h];
            normal(4, &shape[2 - rank..], Dtype::Float32).abs().unwrap()
        });
        Inputs {
            queries: normal(1, &[b, s_q, h, d], dtype),
            keys: normal(2, &[b, s_kv, h_kv, d], dtype),
            values: normal(3, &[b, s_kv, h_kv, d_v], dtype),
            slopes,
            sinks: self.sinks.then(|| normal(5, &[h], Dtype::Float32)),
        }
    }

    fn window(&self) -> [Option<i64>; 2] {
        let right = if self.causal { Some(0) } else { self.window[1] };
        [self.window[0], right].map(|side| side.map(i64::from))
    }

    /// `[B, S_q, H, D_v]` and `[B, H, S_q]`.
    fn expected(&self, inputs: &Inputs) -> (Tensor, Tensor) {
        let tensors = [&inputs.queries, &inputs.keys, &inputs.values].map(Tensor::of);
        let by_head = [&inputs.slopes, &inputs.sinks].map(|array| array.as_ref().map(Tensor::of));
        self.oracle(&tensors, &by_head)
    }

    fn oracle(
        &self,
        tensors: &[Tensor],
        [slopes, sinks]: &[Option<Tensor>; 2],
    ) -> (Tensor, Tensor) {
        let [b, h, _, s_q, s_kv, d, d_v] = self.sizes.map(|size| size as usize);
        let mut output = Vec::new();
        let mut lse = vec![0.0; b * h * s_q];
        for index in 0..b * s_q * h {
            let (n, i, head) = (index / h / s_q, index / h % s_q, index % h);
            let rule = Rule {
                scale: self.scale.map_or(1.0 / (d as f64).sqrt(), f64::from),
                cap: self.soft_cap.map(f64::from),
                slope: slopes
                    .as_ref()
                    .map_or(0.0, |all| all.values[(n * h + head) % all.values.len()]),
                window: self.window(),
                sink: sinks.as_ref().map(|sinks| sinks.at(&[head])),
            };
            let (keys, values) = (self.rows(&tensors[1], n, head), self.rows(&tensors[2], n, head));
            let query = &tensors[0].values[index * d..(index + 1) * d];
            let beside = i as i64 + s_kv as i64 - s_q as i64;
            let (average, sum) = row::attend(query, &keys, &values, beside, d_v, rule);
            output.extend(average);
            lse[(n * h + head) * s_q + i] = sum;
        }
        (Tensor::new(&[b, s_q, h, d_v], output), Tensor::new(&[b, h, s_q], lse))
    }

    /// What query head `head` of batch row `n` reads, of `[B, S_kv, H_kv, _]`.
    fn rows<'a>(&self, tensor: &'a Tensor, n: usize, head: usize) -> Vec<&'a [f64]> {
        let [_, h, h_kv, _, s_kv, ..] = self.sizes.map(|size| size as usize);
        let all: Vec<_> = tensor.rows().collect();
        (0..s_kv).map(|j| all[(n * s_kv + j) * h_kv + head / (h / h_kv)]).collect()
    }

    fn run(
        &self,
        inputs: &Inputs,
        layout: Layout,
        dispatch: mlx_primitives::Dispatch,
    ) -> Result<(Array, Array)> {
        let options = FlashAttentionOptions {
            scale: self.scale,
            causal: self.causal,
            window: Window { left: self.window[0], right: self.window[1] },
            soft_cap: self.soft_cap,
            alibi_slopes: inputs.slopes.as_ref(),
            sinks: inputs.sinks.as_ref(),
            layout,
            dispatch,
            ..Default::default()
        };
        let queries = layout_of(&inputs.queries, layout);
        let keys = laid_out(&inputs.keys, layout, self.place);
        let values = laid_out(&inputs.values, layout, self.place);
        let (y, lse) = flash_attention_with_lse(&queries, &keys, &values, options)?;
        Ok((layout_of(&y, layout), lse))
    }
}

fn layout_of(array: &Array, layout: Layout) -> Array {
    match layout {
        Layout::Bshd => array.clone(),
        Layout::Bhsd => array.swap_axes(1, 2).unwrap(),
    }
}

/// With a kernel in one dtype.
fn check(turn: usize, case: &Case, layout: Layout) {
    for (i, dtype) in FLOATING.into_iter().enumerate() {
        check_in(dtype, case, layout, with_kernels(turn % 3 == i));
    }
}

fn check_in(dtype: Dtype, case: &Case, layout: Layout, backends: &[Backend]) {
    let inputs = case.inputs(dtype);
    let (expected, expected_lse) = case.expected(&inputs);
    on_backends(
        backends,
        OP,
        |dispatch| case.run(&inputs, layout, dispatch),
        |backend, (y, lse)| {
            let what = format!("{} {dtype:?} {layout:?} on {backend}", case.name);
            assert_eq!((y.dtype(), lse.dtype()), (dtype, Dtype::Float32), "{what}");
            // No backend that gives a log-sum-exp rounds before its result.
            assert_close(&what, &y, &expected, Tolerance::of("decode", dtype));
            let what = format!("log-sum-exp of {what}");
            assert_close(&what, &lse, &expected_lse, Tolerance::of("decode", Dtype::Float32));
        },
    );
}

#[test]
fn every_backend_matches_the_oracle() {
    for (turn, case) in CASES.iter().enumerate() {
        check(turn, case, Layout::Bhsd);
    }
}

#[test]
fn either_layout_of_a_cache_is_read_where_it_lies() {
    for (turn, case) in CASES.iter().filter(|case| case.place != Place::Own).enumerate() {
        check(turn, case, Layout::Bshd);
    }
}

#[test]
fn gradients_match_finite_differences() {
    let case = Case {
        soft_cap: Some(2.0),
        window: [Some(3), None],
        ..case("gradient", [1, 4, 2, 2, 6, 5, 3])
    };
    let inputs = case.inputs(Dtype::Float32);
    let tensors = [&inputs.queries, &inputs.keys, &inputs.values].map(Tensor::of);
    let with = |arrays: &[Array]| Inputs {
        queries: arrays[0].clone(),
        keys: arrays[1].clone(),
        values: arrays[2].clone(),
        slopes: None,
        sinks: None,
    };
    gradients_on_each_backend(
        OP,
        &tensors,
        |tensors| case.oracle(tensors, &[None, None]).0,
        |arrays, dispatch| Ok(case.run(&with(arrays), Layout::Bshd, dispatch)?.0),
    );
}

use mlx_primitives::{
    Backend, Dispatch, Error, Layout, Result,
    rope::{RopeFrequencies, RopeOffset, RopeOptions, RopeStyle, rope},
};
use mlx_rs::{Array, Dtype, error::Exception, ops::broadcast_to, transforms::compile::compile};

use super::{OP, oracle::Oracle};
use crate::support::{
    FLOATING,
    backends::on_each_backend,
    compare::assert_close,
    gradient::gradients_on_each_backend,
    sample::{normal, strided},
    tensor::Tensor,
};

const STYLES: [RopeStyle; 2] = [RopeStyle::HalfSplit, RopeStyle::Interleaved];
const LAYOUTS: [Layout; 2] = [Layout::Bshd, Layout::Bhsd];

struct Case {
    name: &'static str,
    /// `[B, S, H, D]`.
    shape: [i32; 4],
    dims: Option<i32>,
    start: Start,
    strided: bool,
}

#[derive(Clone, Copy)]
enum Start {
    At(i32),
    PerRow(&'static [i32]),
}

const fn case(name: &'static str, shape: [i32; 4], start: Start) -> Case {
    Case { name, shape, dims: None, start, strided: false }
}

const CASES: &[Case] = &[
    case("one pair", [1, 1, 1, 2], Start::At(1)),
    case("head 32", [2, 7, 3, 32], Start::At(0)),
    case("head 64", [1, 9, 2, 64], Start::At(7)),
    case("head 80", [2, 8, 1, 80], Start::At(7)),
    case("head 96", [1, 5, 5, 96], Start::At(63)),
    case("head 128", [2, 65, 2, 128], Start::At(0)),
    case("head 256", [1, 3, 4, 256], Start::At(4095)),
    case("far", [1, 3, 2, 64], Start::At(100_000)),
    case("one far step", [3, 1, 4, 128], Start::At(100_000)),
    case("last exact position of f32", [1, 2, 1, 8], Start::At((1 << 24) - 2)),
    case("one step, rows apart", [3, 1, 2, 64], Start::PerRow(&[5, 0, 4095])),
    case("steps, rows apart", [2, 6, 5, 32], Start::PerRow(&[100_000, 3])),
    case("as many rows as steps and heads", [3, 3, 3, 8], Start::PerRow(&[0, 10, 20])),
    case("one row of its own", [1, 4, 2, 32], Start::PerRow(&[9])),
    Case { dims: Some(32), ..case("part of a head", [2, 5, 3, 80], Start::At(7)) },
    Case { dims: Some(2), ..case("one pair of a head", [2, 3, 1, 7], Start::PerRow(&[4, 1])) },
    Case { strided: true, ..case("strided", [2, 5, 3, 64], Start::At(7)) },
    Case {
        strided: true,
        dims: Some(20),
        ..case("part of a strided head", [2, 1, 3, 80], Start::PerRow(&[2, 9]))
    },
];

impl Case {
    fn x(&self, layout: Layout, dtype: Dtype) -> Array {
        let [batch, steps, heads, size] = self.shape;
        let shape = match layout {
            Layout::Bshd => [batch, steps, heads, size],
            Layout::Bhsd => [batch, heads, steps, size],
        };
        let x = normal(1, &shape, dtype);
        if self.strided { strided(&x) } else { x }
    }

    fn oracle(&self, style: RopeStyle, layout: Layout) -> Oracle {
        let [batch, _, _, size] = self.shape;
        let oracle = Oracle::new(style, self.dims.unwrap_or(size), batch, 0);
        let starts = match self.start {
            Start::At(start) => vec![start.into(); batch as usize],
            Start::PerRow(starts) => starts.iter().map(|&start| start.into()).collect(),
        };
        Oracle { layout, starts, ..oracle }
    }

    fn assert(&self, style: RopeStyle, layout: Layout, dtype: Dtype) {
        let x = self.x(layout, dtype);
        let oracle = self.oracle(style, layout);
        let values = Tensor::of(&x);
        let expected = oracle.rotate(&values);
        let starts;
        let offset = match self.start {
            Start::At(start) => RopeOffset::At(start),
            Start::PerRow(rows) => {
                starts = Array::from_slice(rows, &[rows.len() as i32]);
                RopeOffset::PerRow(&starts)
            }
        };
        on_each_backend(
            OP,
            |dispatch| {
                let dims = self.dims;
                rope(
                    &x,
                    offset,
                    RopeOptions { dims, style, layout, dispatch, ..Default::default() },
                )
            },
            |backend, y| {
                let what =
                    format!("{OP} {} {style:?} {layout:?} {dtype:?} on {backend}", self.name);
                assert_eq!(y.dtype(), dtype, "{what}");
                let tolerance = oracle.tolerance(backend, &values, dtype);
                assert_close(&what, &y, &expected, tolerance);
            },
        );
    }
}

#[test]
fn every_backend_matches_the_oracle() {
    for case in CASES {
        for style in STYLES {
            for layout in LAYOUTS {
                for dtype in FLOATING {
                    case.assert(style, layout, dtype);
                }
            }
        }
    }
}

#[test]
fn a_view_turns_as_its_copy_does() {
    let x = normal(1, &[2, 3, 5, 64], Dtype::Float32);
    let view = x.swap_axes(1, 2).unwrap();
    let oracle = Oracle { layout: Layout::Bhsd, ..Oracle::new(RopeStyle::HalfSplit, 64, 2, 7) };
    let expected = oracle.rotate(&Tensor::of(&view));
    on_each_backend(
        OP,
        |dispatch| {
            rope(&view, 7, RopeOptions { layout: Layout::Bhsd, dispatch, ..Default::default() })
        },
        |backend, y| {
            let tolerance = oracle.tolerance(backend, &Tensor::of(&view), Dtype::Float32);
            assert_close(&format!("{OP} of a view on {backend}"), &y, &expected, tolerance);
        },
    );
}

/// A part of a split array, which has gaps, and a broadcast one, whose steps are one in memory.
#[test]
fn what_lies_in_gaps_or_once_turns_as_its_copy_does() {
    for (layout, dtype) in LAYOUTS.into_iter().flat_map(|l| FLOATING.map(|dtype| (l, dtype))) {
        let whole = normal(3, &[2, 5, 7, 64], dtype);
        let mut views = whole.split_at_indices(&[3], 2).unwrap();
        views.push(broadcast_to(normal(4, &[2, 1, 1, 64], dtype), &[2, 5, 3, 64]).unwrap());
        let oracle = Oracle { layout, ..Oracle::new(STYLES[0], 64, 2, 3) };
        for (number, view) in views.iter().enumerate() {
            let values = Tensor::of(view);
            let expected = oracle.rotate(&values);
            on_each_backend(
                OP,
                |dispatch| rope(view, 3, RopeOptions { layout, dispatch, ..Default::default() }),
                |backend, y| {
                    let what = format!("{OP} view {number} {layout:?} {dtype:?} on {backend}");
                    assert_close(&what, &y, &expected, oracle.tolerance(backend, &values, dtype));
                },
            );
        }
    }
}

#[test]
fn given_frequencies_and_magnitude_are_used() {
    let given = RopeFrequencies { inverse: vec![0.5, 0.0, -0.25], magnitude: 1.25 };
    for dtype in FLOATING {
        let x = normal(1, &[2, 5, 3, 8], dtype);
        let values = Tensor::of(&x);
        for style in STYLES {
            let oracle = Oracle {
                frequencies: given.inverse.clone(),
                magnitude: given.magnitude,
                ..Oracle::new(style, 6, 2, 7)
            };
            let expected = oracle.rotate(&values);
            on_each_backend(
                OP,
                |dispatch| {
                    let frequencies = Some(given.clone());
                    let dims = Some(6);
                    let options =
                        RopeOptions { dims, style, frequencies, dispatch, ..Default::default() };
                    rope(&x, 7, options)
                },
                |backend, y| {
                    let what = format!("{OP} by frequencies {style:?} {dtype:?} on {backend}");
                    assert_eq!(y.dtype(), dtype, "{what}");
                    let tolerance = oracle.tolerance(backend, &values, dtype);
                    assert_close(&what, &y, &expected, tolerance);
                },
            );
        }
    }
}

#[test]
fn positions_beyond_mlx_are_left_to_the_reference() {
    let x = normal(1, &[1, 3, 2, 8], Dtype::Float32);
    for start in [-1, -100_000, (1 << 24) - 2, 2_000_000_000, i32::MAX] {
        let on = |dispatch| rope(&x, start, RopeOptions { dispatch, ..Default::default() });
        assert_eq!(
            on(Dispatch::Only(Backend::Builtin)).unwrap_err().to_string(),
            "[rope] backend builtin is unavailable: MLX counts positions from 0 up to 2^24"
        );
        let oracle = Oracle::new(RopeStyle::HalfSplit, 8, 1, start);
        let expected = oracle.rotate(&Tensor::of(&x));
        let tolerance = oracle.tolerance(Backend::Reference, &Tensor::of(&x), Dtype::Float32);
        let y = on(Dispatch::Auto).unwrap();
        assert_close(&format!("{OP} from {start}"), &y, &expected, tolerance);
    }
}

#[test]
fn many_rows_of_few_pairs_turn() {
    let rows = 0..128;
    let (x, starts) =
        (normal(1, &[128, 1, 4, 8], Dtype::Float32), Array::from_iter(rows.clone(), &[128]));
    let y = rope(&x, &starts, RopeOptions::default()).unwrap();
    let oracle = Oracle {
        starts: rows.map(i64::from).collect(),
        ..Oracle::new(RopeStyle::HalfSplit, 8, 128, 0)
    };
    let values = Tensor::of(&x);
    assert_close(
        OP,
        &y,
        &oracle.rotate(&values),
        oracle.tolerance(Backend::Builtin, &values, Dtype::Float32),
    );
}

#[test]
fn nothing_turns_into_nothing() {
    for shape in [[0, 3, 2, 8], [2, 0, 2, 8], [2, 3, 0, 8]] {
        for dtype in FLOATING {
            let x = normal(1, &shape, dtype);
            let starts = Array::from_iter(0..shape[0], &[shape[0]]);
            for offset in [RopeOffset::At(7), RopeOffset::PerRow(&starts)] {
                on_each_backend(
                    OP,
                    |dispatch| rope(&x, offset, RopeOptions { dispatch, ..Default::default() }),
                    |backend, y| {
                        y.eval().unwrap();
                        assert_eq!((y.shape(), y.dtype()), (&shape[..], dtype), "{backend}");
                    },
                );
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for style in STYLES {
        let oracle = Oracle { magnitude: 1.25, ..Oracle::new(style, 4, 2, 3) };
        let frequencies =
            RopeFrequencies { inverse: oracle.frequencies.clone(), magnitude: oracle.magnitude };
        gradients_on_each_backend(
            OP,
            &[Tensor::of(&normal(3, &[2, 3, 2, 6], Dtype::Float32))],
            |inputs| oracle.rotate(&inputs[0]),
            |arrays, dispatch| {
                let frequencies = Some(frequencies.clone());
                let dims = Some(4);
                let options =
                    RopeOptions { dims, style, frequencies, dispatch, ..Default::default() };
                rope(&arrays[0], 3, options)
            },
        );
    }
}

/// What comes back to a sum is one number, broadcast; to a part of what is split, zeros beside it.
#[test]
fn gradients_of_sums_and_parts_match_finite_differences() {
    let oracle = Oracle::new(STYLES[0], 8, 2, 3);
    let whole = Tensor::of(&normal(5, &[2, 3, 4, 8], Dtype::Float32));
    let first_heads = |x: &Tensor| Tensor::from_fn(&[2, 3, 1, 8], |at| x.at(at));
    gradients_on_each_backend(
        OP,
        std::slice::from_ref(&whole),
        |inputs| {
            let turned = oracle.rotate(&first_heads(&inputs[0]));
            Tensor::from_fn(&[2, 1, 1, 1], |at| {
                turned.values[at[0] * 24..][..24].iter().sum::<f64>()
            })
        },
        |arrays, dispatch| {
            let parts = arrays[0].split_at_indices(&[1], 2)?;
            let turned = rope(&parts[0], 3, RopeOptions { dispatch, ..Default::default() })?;
            Ok(turned.sum_axes(&[1, 2, 3], true)?)
        },
    );
}

#[test]
fn it_compiles() {
    let turn = |(x, starts): (&Array, &Array)| -> Result<Array, Exception> {
        Ok(rope(x, starts, RopeOptions::default())?)
    };
    let x = normal(1, &[2, 3, 2, 64], Dtype::Float32);
    let mut compiled = compile(turn, None);
    for rows in [[0, 9], [100_000, 3]] {
        let starts = Array::from_slice(&rows, &[2]);
        let oracle = Oracle {
            starts: rows.map(i64::from).to_vec(),
            ..Oracle::new(RopeStyle::HalfSplit, 64, 2, 0)
        };
        let values = Tensor::of(&x);
        let tolerance = oracle.tolerance(Backend::Builtin, &values, Dtype::Float32);
        let y = compiled((&x, &starts)).unwrap();
        assert_close("compiled rope", &y, &oracle.rotate(&values), tolerance);
    }
}

fn refusal<'a>(x: &Array, offset: impl Into<RopeOffset<'a>>, options: RopeOptions) -> String {
    rope(x, offset, options).unwrap_err().to_string()
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let of = |shape: &[i32], layout| {
        let options = RopeOptions { layout, ..Default::default() };
        refusal(&normal(1, shape, Dtype::Float32), 0, options)
    };
    assert_eq!(
        of(&[2, 3, 8], Layout::Bshd),
        "[rope] x must have shape [B, S, H, D] but got [2, 3, 8]"
    );
    assert_eq!(of(&[8], Layout::Bhsd), "[rope] x must have shape [B, H, S, D] but got [8]");
    assert_eq!(of(&[2, 3, 2, 0], Layout::Bshd), "[rope] dims must be at least 2 but got 0");
    assert_eq!(of(&[2, 3, 2, 7], Layout::Bshd), "[rope] dims must be even but got 7");
    let ints = Array::from_slice(&[0_i32; 8], &[1, 1, 1, 8]);
    assert!(refusal(&ints, 0, RopeOptions::default()).starts_with("[rope] x must have dtype"));
}

#[test]
fn bad_options_are_errors_that_name_the_option() {
    let x = normal(1, &[2, 3, 2, 8], Dtype::Float32);
    let dims = |dims| refusal(&x, 0, RopeOptions { dims: Some(dims), ..Default::default() });
    assert_eq!(dims(10), "[rope] dims must be at most D = 8 but got 10");
    assert_eq!(dims(3), "[rope] dims must be even but got 3");
    assert_eq!(dims(-2), "[rope] dims must be at least 2 but got -2");
    for base in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert_eq!(
            refusal(&x, 0, RopeOptions { base, ..Default::default() }),
            format!("[rope] base must be finite and above 0 but got {base}")
        );
    }
    let frequencies = |inverse: Vec<f64>, magnitude| {
        let frequencies = Some(RopeFrequencies { inverse, magnitude });
        refusal(&x, 0, RopeOptions { frequencies, ..Default::default() })
    };
    assert_eq!(
        frequencies(vec![1.0; 3], 1.0),
        "[rope] frequencies must hold dims/2 = 4 numbers but got 3"
    );
    assert_eq!(
        frequencies(vec![1.0, 1.0, 1.0, f64::NAN], 1.0),
        "[rope] frequencies must be finite but got NaN"
    );
    for magnitude in [f64::INFINITY, -1.0, 0.0] {
        assert_eq!(
            frequencies(vec![1.0; 4], magnitude),
            format!("[rope] frequencies.magnitude must be finite and above 0 but got {magnitude}")
        );
    }
}

#[test]
fn bad_offsets_are_errors() {
    let x = normal(1, &[2, 3, 2, 8], Dtype::Float32);
    let at = |offset: &Array| refusal(&x, offset, RopeOptions::default());
    assert_eq!(
        at(&Array::from_slice(&[0_i32; 3], &[3])),
        "[rope] offset must have shape [2] but got [3]"
    );
    assert_eq!(at(&Array::from_int(3)), "[rope] offset must have shape [2] but got []");
    assert_eq!(
        at(&Array::from_slice(&[0_i64; 2], &[2])),
        "[rope] offset must have dtype Int32 but got Int64"
    );
    let kernel = RopeOptions { dispatch: Dispatch::Only(Backend::Kernel), ..Default::default() };
    assert!(matches!(rope(&x, 0, kernel), Err(Error::Unavailable { .. })));
}

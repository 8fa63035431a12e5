//! Operations on whole rows, forward and with gradients: nothing but memory.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    activation::{Activation, GluOptions, SoftmaxOptions, glu, softmax},
    dispatch::Target,
    norm::{
        GatedRmsNormOptions, LayerNormOptions, RmsNormOptions, add_layer_norm, add_rms_norm,
        gated_rms_norm, layer_norm,
    },
};
use mlx_rs::{Array, Dtype, error::Exception, fast, ops};

use crate::support::{
    Case, Run, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference, sizes, widened,
    with_gradients,
};

const EPS: f32 = 1e-5;

/// A function of arrays to arrays, ours or MLX's.
type Function = fn(&[Array], Dispatch) -> mlx_primitives::Result<Vec<Array>>;
type Theirs = fn(&[Array]) -> Result<Vec<Array>, Exception>;

/// An operation on rows: what it is called, its inputs, and who computes it.
struct RowOp {
    op: &'static str,
    /// Arrays of whole rows among the inputs; the others hold one row, and come after.
    matrices: usize,
    vectors: usize,
    outputs: usize,
    ours: Function,
    fused: Option<(&'static str, Theirs)>,
    composed: Theirs,
}

const ROW_OPS: &[RowOp] = &[
    RowOp {
        op: "add_rms_norm",
        matrices: 2,
        vectors: 1,
        outputs: 2,
        ours: |x, dispatch| {
            let options = RmsNormOptions { dispatch, ..Default::default() };
            add_rms_norm(&x[0], &x[1], &x[2], options).map(|(y, sum)| vec![y, sum])
        },
        fused: Some(("add, fast.rms_norm", |x| {
            let sum = x[0].add(&x[1])?;
            Ok(vec![fast::rms_norm(&sum, Some(&x[2]), EPS)?, sum])
        })),
        composed: |x| {
            let sum = x[0].add(&x[1])?;
            Ok(vec![rms_normed(&sum, &x[2])?.as_dtype(sum.dtype())?, sum])
        },
    },
    RowOp {
        op: "layer_norm",
        matrices: 1,
        vectors: 2,
        outputs: 1,
        ours: |x, dispatch| {
            let options = LayerNormOptions { dispatch, ..Default::default() };
            layer_norm(&x[0], &x[1], &x[2], options).map(|y| vec![y])
        },
        fused: Some(("fast.layer_norm", |x| {
            Ok(vec![fast::layer_norm(&x[0], Some(&x[1]), Some(&x[2]), EPS)?])
        })),
        composed: |x| Ok(vec![standardized(&x[0], &x[1], &x[2])?]),
    },
    RowOp {
        op: "add_layer_norm",
        matrices: 2,
        vectors: 2,
        outputs: 2,
        ours: |x, dispatch| {
            let options = LayerNormOptions { dispatch, ..Default::default() };
            add_layer_norm(&x[0], &x[1], &x[2], &x[3], options).map(|(y, sum)| vec![y, sum])
        },
        fused: Some(("add, fast.layer_norm", |x| {
            let sum = x[0].add(&x[1])?;
            Ok(vec![fast::layer_norm(&sum, Some(&x[2]), Some(&x[3]), EPS)?, sum])
        })),
        composed: |x| {
            let sum = x[0].add(&x[1])?;
            Ok(vec![standardized(&sum, &x[2], &x[3])?, sum])
        },
    },
    RowOp {
        op: "gated_rms_norm",
        matrices: 2,
        vectors: 1,
        outputs: 1,
        ours: |x, dispatch| {
            let options = GatedRmsNormOptions { dispatch, ..Default::default() };
            gated_rms_norm(&x[0], &x[1], &x[2], options).map(|y| vec![y])
        },
        fused: Some(("silu, fast.rms_norm", |x| {
            let gated = x[0].multiply(silu(&x[1])?)?;
            Ok(vec![fast::rms_norm(&gated, Some(&x[2]), EPS)?])
        })),
        composed: |x| {
            let gated = x[0].as_dtype(Dtype::Float32)?.multiply(silu(&x[1])?)?;
            Ok(vec![rms_normed(&gated, &x[2])?.as_dtype(x[0].dtype())?])
        },
    },
    RowOp {
        op: "softmax",
        matrices: 1,
        vectors: 0,
        outputs: 1,
        ours: |x, dispatch| {
            softmax(&x[0], SoftmaxOptions { dispatch, ..Default::default() }).map(|y| vec![y])
        },
        fused: Some(("softmax", |x| Ok(vec![ops::softmax_axis(&x[0], -1, true)?]))),
        composed: |x| {
            let wide = x[0].as_dtype(Dtype::Float32)?;
            let exp = wide.subtract(wide.max_axis(-1, true)?)?.exp()?;
            Ok(vec![exp.divide(exp.sum_axis(-1, true)?)?.as_dtype(x[0].dtype())?])
        },
    },
    glu_op(
        "swiglu",
        |x, dispatch| gated(x, Activation::Silu, dispatch),
        |x| Ok(vec![silu(&x[0])?.multiply(&x[1])?]),
    ),
    glu_op(
        "geglu tanh",
        |x, dispatch| gated(x, Activation::GeluTanh, dispatch),
        |x| Ok(vec![mlx_rs::nn::gelu_approximate(&x[0])?.multiply(&x[1])?.as_dtype(x[0].dtype())?]),
    ),
    glu_op(
        "reglu",
        |x, dispatch| gated(x, Activation::Relu, dispatch),
        |x| Ok(vec![mlx_rs::nn::relu(&x[0])?.multiply(&x[1])?.as_dtype(x[0].dtype())?]),
    ),
];

const fn glu_op(op: &'static str, ours: Function, composed: Theirs) -> RowOp {
    RowOp { op, matrices: 2, vectors: 0, outputs: 1, ours, fused: None, composed }
}

fn gated(
    x: &[Array],
    activation: Activation,
    dispatch: Dispatch,
) -> mlx_primitives::Result<Vec<Array>> {
    let options = GluOptions { activation, dispatch, ..Default::default() };
    glu(&x[0], &x[1], options).map(|y| vec![y])
}

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shapes, trained): (_, &[[i32; 2]], _) = match setting.target {
        Target::Cpu => (Dtype::Float32, &[[256, 1024]], [64, 1024]),
        _ => {
            let shapes = &[[16384, 4096], [4096, 16384]];
            (Dtype::Bfloat16, shapes, [16384, 4096])
        }
    };
    let forward = ROW_OPS
        .iter()
        .flat_map(|op| shapes.iter().map(move |&shape| op.forward(shape, dtype, setting.dispatch)));
    let backward = ROW_OPS.iter().map(|op| op.backward(trained, dtype, setting.dispatch));
    Ok(forward.chain(backward).collect::<Result<_, _>>()?)
}

impl RowOp {
    fn inputs(&self, shape: [i32; 2], dtype: Dtype) -> Result<Vec<Array>, Exception> {
        let matrices = (0..self.matrices).map(|seed| normal(seed as u64, &shape, dtype));
        let vectors = (10..10 + self.vectors).map(|seed| normal(seed as u64, &shape[1..], dtype));
        matrices.chain(vectors).collect()
    }

    fn forward(
        &self,
        shape: [i32; 2],
        dtype: Dtype,
        dispatch: Dispatch,
    ) -> Result<Case, Exception> {
        let inputs = self.inputs(shape, dtype)?;
        let (run, composed) = (self.ours, self.composed);
        let mut baselines: Vec<(_, Run)> = vec![("compiled", compiled(composed))];
        match self.fused {
            Some((name, fused)) => baselines.push((name, mlx(fused))),
            None => baselines.push(("composed", mlx(composed))),
        }
        Ok(Case {
            op: self.op,
            shape: sizes(&shape),
            dtype,
            work: Work::Bytes((self.matrices + self.outputs) * inputs[0].nbytes()),
            inputs,
            ours: ours(move |x| run(x, dispatch)),
            baselines,
            reference: reference(move |x| run(x, Dispatch::Only(Backend::Reference))),
            tolerance: rounded_twice(dtype),
        })
    }

    /// Results and gradients of all inputs: what training runs.
    fn backward(
        &self,
        shape: [i32; 2],
        dtype: Dtype,
        dispatch: Dispatch,
    ) -> Result<Case, Exception> {
        let mut inputs = self.inputs(shape, dtype)?;
        let count = inputs.len();
        for seed in 20..20 + self.outputs {
            inputs.push(normal(seed as u64, &shape, dtype)?);
        }
        let run = self.ours;
        let by = move |dispatch| with_gradients(count, move |x: &[Array]| Ok(run(x, dispatch)?));
        let theirs = self.fused.map_or(self.composed, |(_, fused)| fused);
        // Forward reads the matrices and writes the results; backward reads what saved and what flows back, and writes.
        let matrices = 2 * (self.matrices + self.outputs);
        Ok(Case {
            op: self.op,
            shape: format!("{} with gradients", sizes(&shape)),
            dtype,
            work: Work::Bytes(matrices * inputs[0].nbytes()),
            inputs,
            ours: by(dispatch),
            baselines: vec![
                (self.fused.map_or("composed", |(name, _)| name), with_gradients(count, theirs)),
                ("compiled", compiled_gradients(count, self.composed)),
            ],
            reference: widened(by(Dispatch::Only(Backend::Reference))),
            tolerance: rounded_twice(dtype).with_atol(summed(shape[0], dtype)),
        })
    }
}

/// The function with gradients, fused as far as MLX's compiler can.
fn compiled_gradients(count: usize, run: Theirs) -> Run {
    let mut run = with_gradients(count, run);
    let run = std::cell::RefCell::new(move |x: &[Array]| run(x));
    compiled(move |x| (run.borrow_mut())(x))
}

/// A weight's gradient is a sum over rows, in which each term of about one was rounded: an error that grows with the root
/// of their number, four times as large in the worst of some thousand sums as in most.
fn summed(rows: i32, dtype: Dtype) -> f32 {
    let unit = match dtype {
        Dtype::Float16 => 2.0_f32.powi(-11),
        Dtype::Bfloat16 => 2.0_f32.powi(-8),
        _ => f32::EPSILON,
    };
    4.0 * unit * (rows as f32).sqrt()
}

/// A sum that a kernel rounds before it goes on is off by one rounding, and its result by another.
fn rounded_twice(dtype: Dtype) -> Tolerance {
    match dtype {
        Dtype::Bfloat16 => Tolerance::of(dtype).with_atol(6e-2),
        Dtype::Float16 => Tolerance::of(dtype).with_atol(8e-3),
        _ => Tolerance::of(dtype).with_atol(1e-5),
    }
}

fn silu(x: &Array) -> Result<Array, Exception> {
    ops::sigmoid(x)?.multiply(x)
}

fn rms_normed(x: &Array, weight: &Array) -> Result<Array, Exception> {
    let wide = x.as_dtype(Dtype::Float32)?;
    let scale = wide.square()?.mean_axis(-1, true)?.add(Array::from_f32(EPS))?.rsqrt()?;
    wide.multiply(scale)?.multiply(weight)
}

fn standardized(x: &Array, weight: &Array, bias: &Array) -> Result<Array, Exception> {
    let wide = x.as_dtype(Dtype::Float32)?;
    let centred = wide.subtract(wide.mean_axis(-1, true)?)?;
    let scale = centred.square()?.mean_axis(-1, true)?.add(Array::from_f32(EPS))?.rsqrt()?;
    centred.multiply(scale)?.multiply(weight)?.add(bias)?.as_dtype(x.dtype())
}

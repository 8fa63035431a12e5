//! Attention with what MLX's fused op has no argument for, over a causal prompt.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch, Layout,
    attention::{FlashAttentionOptions, Window, flash_attention_with_lse},
    dispatch::Target,
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{arange, logsumexp_axis, matmul, select, softmax_axis, tanh},
};

use crate::support::{
    Case, Run, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference, sizes,
};

const SOFT_CAP: f32 = 30.0;
const WINDOW: i32 = 512;

/// One option, or none: then it is the log-sum-exp that the fused op lacks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extra {
    None,
    SoftCap,
    Slopes,
    Window,
}

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shape) = match setting.target {
        Target::Cpu => (Dtype::Float32, [1, 8, 256, 64]),
        _ => (Dtype::Bfloat16, [1, 32, 4096, 128]),
    };
    let extras = [Extra::None, Extra::SoftCap, Extra::Slopes, Extra::Window];
    let cases = extras.map(|extra| extra.case(shape, dtype, setting));
    Ok(cases.into_iter().collect::<Result<_, _>>()?)
}

impl Extra {
    fn case(self, shape: [i32; 4], dtype: Dtype, setting: Setting) -> Result<Case, Exception> {
        let [batch, heads, length, size] = shape;
        let slopes = normal(4, &[heads], Dtype::Float32)?.abs()?;
        let mut inputs =
            (1..4).map(|seed| normal(seed, &shape, dtype)).collect::<Result<Vec<_>, _>>()?;
        inputs.push(slopes);
        let seen = match self {
            Self::Window => f64::from(length) * f64::from(WINDOW + 1),
            _ => f64::from(length).powi(2) / 2.0,
        };
        // No kernel is taken before it was measured, which this is for.
        let dispatch = match (setting.target, setting.dispatch) {
            (Target::Cpu, dispatch) | (_, dispatch @ Dispatch::Only(_)) => dispatch,
            _ => Dispatch::Only(Backend::Kernel),
        };
        Ok(Case {
            op: "flash_attention",
            shape: format!("{} causal, {}", sizes(&shape), self.name()),
            dtype,
            work: Work::Flops(4.0 * f64::from(batch * heads) * seen * f64::from(size)),
            inputs,
            ours: ours(move |x| self.attend(x, dispatch)),
            baselines: vec![
                ("composed", mlx(move |x| self.composed(x))),
                ("compiled", self.compiled()),
            ],
            reference: reference(move |x| self.attend(x, Dispatch::Only(Backend::Reference))),
            // Weights are rounded to the dtype before they meet the values, of which the first queries see a handful.
            tolerance: Tolerance::of(dtype).with_atol(match dtype {
                Dtype::Float32 => 1e-5,
                _ => 1.6e-2,
            }),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "log-sum-exp",
            Self::SoftCap => "soft cap",
            Self::Slopes => "ALiBi",
            Self::Window => "window 512",
        }
    }

    fn attend(self, x: &[Array], dispatch: Dispatch) -> mlx_primitives::Result<Vec<Array>> {
        let options = FlashAttentionOptions {
            causal: true,
            soft_cap: (self == Self::SoftCap).then_some(SOFT_CAP),
            alibi_slopes: (self == Self::Slopes).then_some(&x[3]),
            window: Window { left: (self == Self::Window).then_some(WINDOW), right: None },
            layout: Layout::Bhsd,
            dispatch,
            ..Default::default()
        };
        let (y, lse) = flash_attention_with_lse(&x[0], &x[1], &x[2], options)?;
        Ok(vec![y, lse.as_dtype(x[0].dtype())?])
    }

    fn compiled(self) -> Run {
        compiled(move |x| self.composed(x))
    }

    /// What a user of MLX would write.
    fn composed(self, x: &[Array]) -> Result<Vec<Array>, Exception> {
        let (length, scale) = (x[0].dim(2), (x[0].dim(3) as f32).sqrt().recip());
        let dtype = x[0].dtype();
        let mut scores = matmul(&x[0], x[1].swap_axes(-1, -2)?)?.multiply(scalar(scale, dtype)?)?;
        let place = arange::<i32, i32>(None, length, None)?;
        let distance = place.expand_dims(-1)?.subtract(&place)?;
        let mut seen = distance.ge(Array::from_int(0))?;
        match self {
            Self::None => {}
            Self::SoftCap => {
                let cap = scalar(SOFT_CAP, dtype)?;
                scores = tanh(scores.divide(&cap)?)?.multiply(&cap)?;
            }
            Self::Slopes => {
                let slopes = x[3].reshape(&[-1, 1, 1])?;
                scores = scores.subtract(slopes.multiply(distance.as_dtype(Dtype::Float32)?)?)?;
            }
            Self::Window => seen = seen.logical_and(distance.le(Array::from_int(WINDOW))?)?,
        }
        let scores = select(seen, scores, Array::from_f32(f32::NEG_INFINITY))?;
        let weights = softmax_axis(&scores, -1, true)?.as_dtype(dtype)?;
        let lse = logsumexp_axis(scores.as_dtype(Dtype::Float32)?, -1, false)?.as_dtype(dtype)?;
        Ok(vec![matmul(weights, &x[2])?, lse])
    }
}

fn scalar(value: f32, dtype: Dtype) -> Result<Array, Exception> {
    Array::from_f32(value).as_dtype(dtype)
}

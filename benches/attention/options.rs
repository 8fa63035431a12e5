//! Attention with what MLX's fused op has no argument for, over a causal prompt.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch, Layout,
    attention::{FlashAttentionOptions, flash_attention, flash_attention_with_lse},
    dispatch::Target,
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention},
    ops::{arange, logsumexp_axis, matmul, select, sigmoid, softmax_axis, tanh},
};

use crate::support::{
    Case, Run, Setting, Tolerance, Work, compiled, mlx, normal, ours, reference, sizes, widened,
    with_gradients,
};

const SOFT_CAP: f32 = 30.0;

/// One option, or one more result.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extra {
    LogSumExp,
    SoftCap,
    Slopes,
    Sinks,
}

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let (dtype, shapes): (_, &[[i32; 4]]) = match setting.target {
        Target::Cpu => (Dtype::Float32, &[[1, 8, 256, 64]]),
        _ => (Dtype::Bfloat16, &[[4, 32, 4096, 128], [1, 8, 512, 64]]),
    };
    let extras = [Extra::LogSumExp, Extra::SoftCap, Extra::Slopes, Extra::Sinks];
    let mut cases = Vec::new();
    for &shape in shapes {
        for extra in extras {
            cases.push(extra.case(shape, dtype, setting.dispatch)?);
        }
    }
    let gradients: &[_] = match setting.target {
        Target::Cpu => &[(dtype, shapes[0])],
        _ => &[(dtype, [1, 32, 4096, 128]), (Dtype::Float32, [1, 32, 4096, 128])],
    };
    for &(dtype, shape) in gradients {
        cases.push(Extra::SoftCap.gradient(shape, dtype, setting.dispatch)?);
    }
    Ok(cases)
}

impl Extra {
    fn case(self, shape: [i32; 4], dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
        let heads = shape[1];
        let mut inputs =
            (1..4).map(|seed| normal(seed, &shape, dtype)).collect::<Result<Vec<_>, _>>()?;
        let by_head = normal(4, &[heads], Dtype::Float32)?.abs()?;
        inputs.push(if self == Self::Sinks { by_head.as_dtype(dtype)? } else { by_head });
        Ok(Case {
            op: "flash_attention",
            shape: format!("{} causal, {}", sizes(&shape), self.name()),
            dtype,
            work: Work::Flops(products(shape, 2.0)),
            inputs,
            ours: ours(move |x| self.attend(x, dispatch)),
            baselines: self.baselines(),
            reference: reference(move |x| self.attend(x, Dispatch::Only(Backend::Reference))),
            // Weights are rounded to the dtype before they meet the values, of which the first queries see a handful.
            tolerance: Tolerance::of(dtype).with_atol(match dtype {
                Dtype::Float32 => 1e-5,
                _ => 1.6e-2,
            }),
        })
    }

    fn baselines(self) -> Vec<(&'static str, Run)> {
        let mut baselines = vec![
            ("composed", mlx(move |x| self.composed(x))),
            ("compiled", compiled(move |x| self.composed(x))),
        ];
        if self == Self::Sinks {
            baselines.push(("fast.sdpa", mlx(with_sinks)));
        }
        baselines
    }

    /// The result and the gradients of queries, keys and values.
    fn gradient(
        self,
        shape: [i32; 4],
        dtype: Dtype,
        dispatch: Dispatch,
    ) -> Result<Case, Exception> {
        let inputs = (1..5).map(|seed| normal(seed, &shape, dtype)).collect::<Result<_, _>>()?;
        let run = move |dispatch| {
            with_gradients(3, move |x| self.attend(x, dispatch).map_err(Exception::from))
        };
        let composed = move |x: &[Array]| self.composed(x);
        Ok(Case {
            op: "flash_attention",
            shape: format!("{} causal, {}, gradients", sizes(&shape), self.name()),
            dtype,
            work: Work::Flops(products(shape, 7.0)),
            inputs,
            ours: run(dispatch),
            baselines: vec![("composed", with_gradients(3, composed))],
            reference: widened(run(Dispatch::Only(Backend::Reference))),
            // Of the first keys gradients are sums of a few rounded weights times gradients of up to 5.
            tolerance: Tolerance::of(dtype).with_atol(match dtype {
                Dtype::Float32 => 1e-4,
                _ => 4e-2,
            }),
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::LogSumExp => "log-sum-exp",
            Self::SoftCap => "soft cap",
            Self::Slopes => "ALiBi",
            Self::Sinks => "sinks",
        }
    }

    fn attend(self, x: &[Array], dispatch: Dispatch) -> mlx_primitives::Result<Vec<Array>> {
        let by_head = |option| (self == option).then(|| &x[3]);
        let options = FlashAttentionOptions {
            causal: true,
            soft_cap: (self == Self::SoftCap).then_some(SOFT_CAP),
            alibi_slopes: by_head(Self::Slopes),
            sinks: by_head(Self::Sinks),
            layout: Layout::Bhsd,
            dispatch,
            ..Default::default()
        };
        if self != Self::LogSumExp {
            return Ok(vec![flash_attention(&x[0], &x[1], &x[2], options)?]);
        }
        let (y, lse) = flash_attention_with_lse(&x[0], &x[1], &x[2], options)?;
        Ok(vec![y, lse.as_dtype(x[0].dtype())?])
    }

    /// What a user of MLX would write.
    fn composed(self, x: &[Array]) -> Result<Vec<Array>, Exception> {
        let (length, scale) = (x[0].dim(2), (x[0].dim(3) as f32).sqrt().recip());
        let dtype = x[0].dtype();
        let mut scores = matmul(&x[0], x[1].swap_axes(-1, -2)?)?.multiply(scalar(scale, dtype)?)?;
        let place = arange::<i32, i32>(None, length, None)?;
        let distance = place.expand_dims(-1)?.subtract(&place)?;
        let seen = distance.ge(Array::from_int(0))?;
        match self {
            Self::LogSumExp | Self::Sinks => {}
            Self::SoftCap => {
                let cap = scalar(SOFT_CAP, dtype)?;
                scores = tanh(scores.divide(&cap)?)?.multiply(&cap)?;
            }
            Self::Slopes => {
                let slopes = x[3].reshape(&[-1, 1, 1])?;
                scores = scores.subtract(slopes.multiply(distance.as_dtype(Dtype::Float32)?)?)?;
            }
        }
        let scores = select(seen, scores, Array::from_f32(f32::NEG_INFINITY))?;
        let weights = softmax_axis(&scores, -1, true)?.as_dtype(dtype)?;
        let y = matmul(weights, &x[2])?;
        if !matches!(self, Self::LogSumExp | Self::Sinks) {
            return Ok(vec![y]);
        }
        let lse = logsumexp_axis(scores.as_dtype(Dtype::Float32)?, -1, false)?;
        if self == Self::LogSumExp {
            return Ok(vec![y, lse.as_dtype(dtype)?]);
        }
        let share = sigmoid(lse.subtract(x[3].reshape(&[-1, 1])?)?)?.as_dtype(dtype)?;
        Ok(vec![y.multiply(share.expand_dims(-1)?)?])
    }
}

fn with_sinks(x: &[Array]) -> Result<Array, Exception> {
    let scale = (x[0].dim(3) as f32).sqrt().recip();
    let mask = ScaledDotProductAttentionMask::Causal;
    scaled_dot_product_attention(&x[0], &x[1], &x[2], scale, Some(mask), Some(&x[3]))
}

/// Multiplications and additions of so many products of half the scores.
fn products([batch, heads, length, size]: [i32; 4], count: f64) -> f64 {
    let pairs = f64::from(length).powi(2) / 2.0;
    2.0 * count * f64::from(batch * heads) * pairs * f64::from(size)
}

fn scalar(value: f32, dtype: Dtype) -> Result<Array, Exception> {
    Array::from_f32(value).as_dtype(dtype)
}

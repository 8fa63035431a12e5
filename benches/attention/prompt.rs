//! Attention: over a prompt, which is arithmetic, and of one new token, which is memory.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch, Layout,
    attention::{FlashAttentionOptions, flash_attention},
    dispatch::Target,
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention},
};

use crate::support::{Case, Setting, Tolerance, Work, mlx, normal, ours, reference, sizes};

/// Self-attention over a prompt, or one query over the keys before it.
#[derive(Clone, Copy)]
struct Problem {
    batch: i32,
    heads: i32,
    kv_heads: i32,
    queries: i32,
    keys: i32,
    size: i32,
    causal: bool,
}

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let problem = |batch, heads, kv_heads, queries, keys, size, causal| Problem {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        size,
        causal,
    };
    let (half, single) = (Dtype::Bfloat16, Dtype::Float32);
    let problems = match setting.target {
        Target::Cpu => vec![
            (single, problem(1, 8, 8, 256, 256, 64, true)),
            (single, problem(1, 8, 8, 256, 256, 64, false)),
            (single, problem(1, 8, 2, 1, 2048, 64, false)),
            (single, problem(1, 8, 8, 4096, 4096, 64, true)),
        ],
        _ => vec![
            (half, problem(4, 32, 32, 4096, 4096, 128, true)),
            (half, problem(4, 32, 32, 4096, 4096, 128, false)),
            (half, problem(4, 8, 8, 4096, 4096, 192, true)),
            (half, problem(4, 8, 8, 4096, 4096, 256, true)),
            (single, problem(4, 8, 8, 4096, 4096, 128, true)),
            (single, problem(1, 8, 8, 1024, 1024, 64, true)),
            (single, problem(1, 8, 8, 4096, 4096, 64, true)),
            (single, problem(4, 8, 8, 1024, 1024, 128, true)),
            (half, problem(1, 8, 8, 1024, 1024, 256, true)),
            (half, problem(1, 8, 8, 4096, 4096, 192, true)),
        ],
    };
    let dispatch = setting.dispatch;
    let cases = problems.into_iter().map(|(dtype, problem)| problem.case(dtype, dispatch));
    Ok(cases.collect::<Result<_, _>>()?)
}

impl Problem {
    fn case(self, dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
        let inputs = self.inputs(dtype)?;
        let Self { size, causal, .. } = self;
        let scale = (size as f32).sqrt().recip();
        Ok(Case {
            op: "flash_attention",
            shape: self.text(),
            dtype,
            work: self.work(&inputs),
            inputs,
            ours: ours(move |x| attend(x, causal, dispatch)),
            baselines: vec![(
                "fast.sdpa",
                mlx(move |x| {
                    let mask = causal.then_some(ScaledDotProductAttentionMask::Causal);
                    scaled_dot_product_attention(&x[0], &x[1], &x[2], scale, mask, None)
                }),
            )],
            reference: reference(move |x| attend(x, causal, Dispatch::Only(Backend::Reference))),
            tolerance: self.tolerance(dtype),
        })
    }

    fn inputs(self, dtype: Dtype) -> Result<Vec<Array>, Exception> {
        let queries = [self.batch, self.heads, self.queries, self.size];
        let keys = [self.batch, self.kv_heads, self.keys, self.size];
        Ok(vec![normal(1, &queries, dtype)?, normal(2, &keys, dtype)?, normal(3, &keys, dtype)?])
    }

    /// Weights are rounded to the dtype before they meet the values. Among thousands of keys that
    /// averages out; the first queries of a causal prompt see a handful, of up to 5. In f32 the scores' last bits do the same.
    fn tolerance(self, dtype: Dtype) -> Tolerance {
        match (self.causal, dtype) {
            (true, Dtype::Float16 | Dtype::Bfloat16) => Tolerance::of(dtype).with_atol(1.6e-2),
            (true, _) => Tolerance::of(dtype).with_atol(1e-5),
            _ => Tolerance::of(dtype),
        }
    }

    fn text(self) -> String {
        let queries = sizes(&[self.batch, self.heads, self.queries, self.size]);
        match (self.queries == self.keys, self.causal) {
            (true, true) => format!("{queries} causal"),
            (true, false) => queries,
            _ => format!("{queries} over {}", sizes(&[self.kv_heads, self.keys])),
        }
    }

    fn work(self, inputs: &[Array]) -> Work {
        if self.queries == 1 {
            return Work::Bytes(inputs.iter().chain([&inputs[0]]).map(Array::nbytes).sum());
        }
        let pairs = f64::from(self.queries) * f64::from(self.keys);
        let seen = if self.causal { pairs / 2.0 } else { pairs };
        Work::Flops(4.0 * f64::from(self.batch * self.heads) * seen * f64::from(self.size))
    }
}

fn attend(x: &[Array], causal: bool, dispatch: Dispatch) -> mlx_primitives::Result<Array> {
    let layout = Layout::Bhsd;
    let options = FlashAttentionOptions { causal, layout, dispatch, ..Default::default() };
    flash_attention(&x[0], &x[1], &x[2], options)
}

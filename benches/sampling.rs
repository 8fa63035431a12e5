//! A token for each row of logits and its log-probability, beside what sorts.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch,
    dispatch::Target,
    sampling::{SamplerBatch, SamplerBatchOptions, SamplingParams, TokenHistory},
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{
        cumsum,
        indexing::{argmax_axis, take_along_axis},
        maximum, partition_axis, select, softmax_axis, sort_axis,
    },
    random,
};

use crate::support::{Case, Run, Setting, Tolerance, Work, mlx, normal, ours, sizes};

const VOCABULARY: i32 = 128_256;
/// That of small models.
const SMALL: i32 = 49_152;
const TOP_K: i32 = 50;
const TOP_P: f32 = 0.9;
const MIN_P: f32 = 0.05;

/// A sampler: its name, a request's parameters, and what of MLX leaves as much of some logits.
struct SampleOp {
    op: &'static str,
    params: fn() -> SamplingParams,
    filters: &'static [(&'static str, Filter)],
}

type Filter = fn(&Array) -> Result<Array, Exception>;

const OPS: &[SampleOp] = &[
    SampleOp {
        op: "sample_greedy",
        params: || SamplingParams { temperature: 0.0, ..Default::default() },
        filters: &[],
    },
    SampleOp {
        op: "sample",
        params: SamplingParams::default,
        filters: &[("categorical", |logits| Ok(logits.clone()))],
    },
    SampleOp {
        op: "sample_top_k",
        params: || SamplingParams { top_k: TOP_K, ..Default::default() },
        filters: &[
            ("partition, categorical", |logits| {
                best(logits, |logits, place, axis| partition_axis(logits, place, axis))
            }),
            ("sort, categorical", |logits| best(logits, |logits, _, axis| sort_axis(logits, axis))),
        ],
    },
    SampleOp {
        op: "sample_top_p",
        params: || SamplingParams { top_p: TOP_P, ..Default::default() },
        filters: &[("sort, cumsum, categorical", nucleus)],
    },
    SampleOp {
        op: "sample_min_p",
        params: || SamplingParams { min_p: MIN_P, ..Default::default() },
        filters: &[("max, categorical", |logits| {
            let least = logits.max_axis(-1, true)?.add(Array::from_f32(MIN_P.ln()))?;
            only(logits, &logits.ge(least)?)
        })],
    },
];

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let shapes: &[[i32; 2]] = match setting.target {
        Target::Cpu => &[[1, VOCABULARY]],
        _ => &[[32, VOCABULARY], [1, VOCABULARY], [1, SMALL]],
    };
    let mut cases = Vec::new();
    for op in OPS {
        for &shape in shapes {
            // Logits of a model are apart; where they are not, a nucleus holds half of the vocabulary.
            for (what, deviation) in [("", 3.0), (" flat", 1.0)] {
                if what.is_empty() || op.op == "sample_top_p" {
                    cases.push(case(op, shape, what, deviation, setting.dispatch)?);
                }
            }
        }
    }
    Ok(cases)
}

fn case(
    op: &SampleOp,
    shape: [i32; 2],
    what: &str,
    deviation: f32,
    dispatch: Dispatch,
) -> Result<Case> {
    let [count, _] = shape;
    let logits = normal(1, &shape, Dtype::Float32)?.multiply(Array::from_f32(deviation))?;
    let positions = Array::from_slice(&vec![7; count as usize], &[count]);
    let greedy = ("argmax", mlx(|x| with_log_probability(&x[0], &argmax_axis(&x[0], -1, true)?)));
    let drawn = op.filters.iter().map(|&(name, filter)| {
        let key = random::key(3)?;
        let run = mlx(move |x: &[Array]| {
            let token = random::categorical(filter(&x[0])?, -1, None, &key)?;
            with_log_probability(&x[0], &token.expand_dims(-1)?)
        });
        Ok((name, run))
    });
    let mut baselines = drawn.collect::<Result<Vec<_>, Exception>>()?;
    if baselines.is_empty() {
        baselines.push(greedy);
    }
    Ok(Case {
        op: op.op,
        shape: format!("{}{what}", sizes(&shape)),
        dtype: Dtype::Float32,
        work: Work::Bytes(logits.nbytes()),
        inputs: vec![logits, positions],
        ours: sampler(op, shape, dispatch)?,
        baselines,
        reference: sampler(op, shape, Dispatch::Only(Backend::Reference))?,
        // MLX draws other tokens, of other log-probabilities: no further apart than tokens are that are ever drawn.
        // Which tokens are drawn, the tests compare; the greedy one is the same.
        tolerance: match op.filters {
            [] => Tolerance::of(Dtype::Float32),
            _ => Tolerance::of(Dtype::Float32).with_atol(30.0),
        },
    })
}

/// Draws for as many requests with seeds of their own; the batch is made once.
fn sampler(op: &SampleOp, [count, vocabulary]: [i32; 2], dispatch: Dispatch) -> Result<Run> {
    let requests = (0..count as u64).map(|seed| {
        let params = SamplingParams { seed, ..(op.params)() };
        let history = TokenHistory::new(&params, vocabulary, &[], &[])?;
        Ok((params, history))
    });
    let requests = requests.collect::<mlx_primitives::Result<Vec<_>>>()?;
    let options = SamplerBatchOptions { dispatch, ..Default::default() };
    let batch = SamplerBatch::new(requests, vocabulary, options)?;
    Ok(ours(move |x| batch.sample(&x[0], &x[1]).map(|sampled| sampled.log_probabilities)))
}

fn with_log_probability(logits: &Array, token: &Array) -> Result<Array, Exception> {
    let chosen = take_along_axis(logits, token, -1)?;
    chosen.subtract(logits.logsumexp_axis(-1, true)?)?.squeeze_axes(&[-1])
}

fn only(logits: &Array, kept: &Array) -> Result<Array, Exception> {
    select(kept, logits, Array::from_f32(f32::NEG_INFINITY))
}

/// The largest, found in what `order` makes of the row.
fn best(
    logits: &Array,
    order: impl Fn(&Array, i32, i32) -> Result<Array, Exception>,
) -> Result<Array, Exception> {
    let place = logits.dim(-1) - TOP_K;
    let ordered = order(logits, place, -1)?;
    let least = ordered.take_axis(Array::from_slice(&[place], &[1]), -1)?;
    only(logits, &logits.ge(least)?)
}

fn nucleus(logits: &Array) -> Result<Array, Exception> {
    let sorted = sort_axis(logits, -1)?;
    let sums = cumsum(softmax_axis(&sorted, -1, true)?, -1, None, None)?;
    let dropped =
        sums.le(Array::from_f32(1.0 - TOP_P))?.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?;
    let place = maximum(dropped, Array::from_int(0))?;
    let least = take_along_axis(sorted, place, -1)?;
    only(logits, &logits.ge(least)?)
}

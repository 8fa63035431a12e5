//! Attention of one new token of each sequence, which is memory: over a slice of a cache, and over blocks of a pool.

use anyhow::Result;
use mlx_primitives::{
    Backend, Dispatch, Layout,
    attention::{FlashAttentionOptions, PagedAttentionOptions, flash_attention, paged_attention},
    dispatch::Target,
};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    fast::scaled_dot_product_attention,
    ops::{argsort, indexing::TryIndexOp},
};

use crate::support::{Case, Setting, Tolerance, Work, mlx, normal, ours, reference, sizes};

/// Sequences of one length, with a query each.
#[derive(Clone, Copy)]
struct Problem {
    batch: i32,
    heads: i32,
    kv_heads: i32,
    keys: i32,
    size: i32,
}

/// Keys of a block of the pool.
const BLOCK: i32 = 16;

pub(crate) fn cases(setting: Setting) -> Result<Vec<Case>> {
    let problem =
        |batch, heads, kv_heads, keys, size| Problem { batch, heads, kv_heads, keys, size };
    let (dtype, problems) = match setting.target {
        Target::Cpu => (Dtype::Float32, vec![problem(2, 8, 2, 512, 64)]),
        _ => (
            Dtype::Bfloat16,
            vec![
                problem(1, 32, 8, 8192, 128),
                problem(8, 32, 8, 8192, 128),
                problem(8, 32, 8, 8192 + 128 + 1, 128),
                problem(8, 32, 8, 8448, 128),
                problem(8, 32, 8, 1024, 128),
                problem(32, 32, 8, 4096, 128),
            ],
        ),
    };
    let dispatch = setting.dispatch;
    let caches = problems.iter().map(|problem| problem.over_cache(dtype, dispatch));
    let whole = problems.iter().filter(|problem| problem.keys % BLOCK == 0);
    let cases = caches.chain(whole.map(|problem| problem.over_blocks(dtype, dispatch)));
    Ok(cases.collect::<Result<_, _>>()?)
}

impl Problem {
    /// Keys and values are the first of a cache that has room for a quarter more.
    fn over_cache(self, dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
        let Self { batch, heads, kv_heads, keys, size } = self;
        let cache = [batch, kv_heads, keys + keys / 4, size];
        let queries = normal(1, &[batch, heads, 1, size], dtype)?;
        Ok(Case {
            op: "flash_attention",
            shape: self.text("cache"),
            dtype,
            work: self.work(dtype, &queries),
            inputs: vec![queries, normal(2, &cache, dtype)?, normal(3, &cache, dtype)?],
            ours: ours(move |x| attend(x, keys, dispatch)),
            baselines: vec![(
                "fast.sdpa",
                mlx(move |x| {
                    let [k, v] = [slice(&x[1], keys)?, slice(&x[2], keys)?];
                    scaled_dot_product_attention(&x[0], k, v, scale(size), None, None)
                }),
            )],
            reference: reference(move |x| attend(x, keys, Dispatch::Only(Backend::Reference))),
            tolerance: Tolerance::of(dtype),
        })
    }

    /// The blocks of each sequence lie anywhere in a pool.
    fn over_blocks(self, dtype: Dtype, dispatch: Dispatch) -> Result<Case, Exception> {
        let Self { batch, heads, kv_heads, keys, size } = self;
        let blocks = batch * (keys / BLOCK);
        let pool = [blocks, BLOCK, kv_heads, size];
        let queries = normal(1, &[batch, heads, size], dtype)?;
        let places = argsort(normal(4, &[blocks], Dtype::Float32)?)?.as_dtype(Dtype::Int32)?;
        let tables = places.reshape(&[batch, -1])?;
        let lengths = Array::full::<i32>(&[batch], Array::from_int(keys))?;
        Ok(Case {
            op: "paged_attention",
            shape: self.text("blocks"),
            dtype,
            work: self.work(dtype, &queries),
            inputs: vec![
                queries,
                normal(2, &pool, dtype)?,
                normal(3, &pool, dtype)?,
                tables,
                lengths,
            ],
            ours: ours(move |x| attend_blocks(x, dispatch)),
            baselines: vec![(
                "gather, fast.sdpa",
                mlx(move |x| {
                    let [k, v] = [gathered(&x[1], &x[3])?, gathered(&x[2], &x[3])?];
                    let queries = x[0].expand_dims(2)?;
                    scaled_dot_product_attention(queries, k, v, scale(size), None, None)?
                        .squeeze_axes(&[2])
                }),
            )],
            reference: reference(move |x| attend_blocks(x, Dispatch::Only(Backend::Reference))),
            tolerance: Tolerance::of(dtype),
        })
    }

    fn work(self, dtype: Dtype, queries: &Array) -> Work {
        let bytes = if dtype == Dtype::Float32 { 4 } else { 2 };
        let rows = self.batch as usize * self.kv_heads as usize * self.keys as usize;
        Work::Bytes(2 * rows * self.size as usize * bytes + 2 * queries.nbytes())
    }

    fn text(self, place: &str) -> String {
        let queries = sizes(&[self.batch, self.heads, 1, self.size]);
        format!("{queries} over {}, {place}", sizes(&[self.kv_heads, self.keys]))
    }
}

fn scale(size: i32) -> f32 {
    (size as f32).sqrt().recip()
}

fn slice(cache: &Array, keys: i32) -> Result<Array, Exception> {
    cache.try_index((.., .., ..keys, ..))
}

fn attend(x: &[Array], keys: i32, dispatch: Dispatch) -> mlx_primitives::Result<Array> {
    let options = FlashAttentionOptions {
        layout: Layout::Bhsd,
        causal: true,
        dispatch,
        ..Default::default()
    };
    flash_attention(&x[0], slice(&x[1], keys)?, slice(&x[2], keys)?, options)
}

/// `[B, H_kv, S, D]` of a pool.
fn gathered(pool: &Array, tables: &Array) -> Result<Array, Exception> {
    pool.take_axis(tables, 0)?.flatten(1, 2)?.swap_axes(1, 2)
}

fn attend_blocks(x: &[Array], dispatch: Dispatch) -> mlx_primitives::Result<Array> {
    let options = PagedAttentionOptions { dispatch, ..Default::default() };
    paged_attention(&x[0], &x[1], &x[2], &x[3], &x[4], options)
}

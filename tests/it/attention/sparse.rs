use mlx_primitives::{Layout, Result, attention::*};
use mlx_rs::{Array, Dtype, transforms::compile::compile};

use super::{
    linear_support::{check_all_as, check_refusals, inputs, refusal, tensors, zeros},
    visible_oracle::attend_visible,
};
use crate::support::{
    compare::{Tolerance, assert_close},
    gradient::assert_gradients,
    tensor::Tensor,
};

const FLASH: &str = "flash_attention";

/// Rows of any kind: all blocks, some, one, none.
fn rows(queries: usize, keys: usize, size: usize) -> Vec<Vec<i32>> {
    let (rows, blocks) = (queries.div_ceil(size), keys.div_ceil(size) as i32);
    let row = |row: usize| match row % 5 {
        0 => (0..blocks).collect(),
        1 => (0..blocks).filter(|block| (block + row as i32) % 3 != 0).collect(),
        2 => vec![],
        3 => (0..blocks).rev().step_by(2).collect(),
        _ => (0..blocks).take(1).collect(),
    };
    (0..rows).map(row).collect()
}

fn sees(rows: &[Vec<i32>], size: usize, i: usize, j: usize) -> bool {
    rows[i / size].contains(&((j / size) as i32))
}

fn later(causal: bool, [queries, keys]: [usize; 2], i: usize, j: usize) -> bool {
    causal && j + queries > i + keys
}

fn by_blocks(inputs: [&Tensor; 3], size: usize, causal: bool, scale: Option<f64>) -> Tensor {
    let lengths = [inputs[0].shape[1], inputs[1].shape[1]];
    let rows = rows(lengths[0], lengths[1], size);
    attend_visible(inputs, scale, |i, j| sees(&rows, size, i, j) && !later(causal, lengths, i, j))
}

fn run_blocks(
    inputs: &[Array],
    size: i32,
    options: impl Fn(BlockSparseAttentionOptions<'_>) -> BlockSparseAttentionOptions<'_>,
) -> Result<Array> {
    let layout = options(BlockSparseAttentionOptions::new(&BlockLayout::new(1, 0, vec![])?)).layout;
    let length = |array: &Array| array.dim(layout.sequence_axis());
    let (queries, keys) = (length(&inputs[0]), length(&inputs[1]));
    let rows = rows(queries as usize, keys as usize, size as usize);
    let blocks = BlockLayout::new(size, (keys as usize).div_ceil(size as usize) as i32, rows)?;
    let options = options(BlockSparseAttentionOptions::new(&blocks));
    block_sparse_attention(&inputs[0], &inputs[1], &inputs[2], options)
}

#[test]
fn blocks_match_the_oracle() {
    for size in [1, 4, 16, 100] {
        check_all_as(
            FLASH,
            "block_sparse_attention",
            |inputs, causal| by_blocks(inputs, size as usize, causal, None),
            |inputs, layout, causal| {
                run_blocks(inputs, size, |options| BlockSparseAttentionOptions {
                    layout,
                    causal,
                    ..options
                })
            },
        );
    }
}

#[test]
fn the_scale_is_taken() {
    let inputs = inputs([1, 2, 1, 7, 9, 4, 4], Dtype::Float32);
    for scale in [0.0, -0.7] {
        let y = run_blocks(&inputs, 4, |options| BlockSparseAttentionOptions {
            scale: Some(scale),
            ..options
        });
        let expected = by_blocks(tensors(&inputs).each_ref(), 4, false, Some(scale.into()));
        assert_close("scale", &y.unwrap(), &expected, Tolerance::of(FLASH, Dtype::Float32));
    }
}

#[test]
fn rows_that_see_nothing_are_zero() {
    let inputs = inputs([1, 2, 1, 9, 9, 4, 4], Dtype::Float32);
    let blocks = BlockLayout::new(4, 3, vec![vec![2], vec![], vec![]]).unwrap();
    let options =
        BlockSparseAttentionOptions { causal: true, ..BlockSparseAttentionOptions::new(&blocks) };
    let y = block_sparse_attention(&inputs[0], &inputs[1], &inputs[2], options).unwrap();
    assert!(Tensor::of(&y).values.iter().all(|&y| y == 0.0));
}

#[test]
fn gradients_of_blocks_match_finite_differences() {
    for (shape, causal) in [([2, 2, 1, 7, 7, 3, 2], false), ([1, 2, 2, 6, 9, 3, 2], true)] {
        assert_gradients(
            "block_sparse_attention",
            &tensors(&inputs(shape, Dtype::Float32)),
            |inputs| by_blocks([&inputs[0], &inputs[1], &inputs[2]], 2, causal, None),
            |inputs| {
                run_blocks(inputs, 2, |options| BlockSparseAttentionOptions { causal, ..options })
            },
        );
    }
}

#[test]
fn it_compiles() {
    let run = |inputs: &[Array]| -> mlx_rs::error::Result<Vec<Array>> {
        Ok(vec![run_blocks(inputs, 4, |options| options)?])
    };
    let inputs = inputs([1, 4, 2, 9, 9, 8, 8], Dtype::Float32);
    let expected = Tensor::of(&run(&inputs).unwrap()[0]);
    let got = compile(run, None)(&inputs[..]).unwrap();
    assert_close("compiled", &got[0], &expected, Tolerance::of(FLASH, Dtype::Float32));
}

/// All scores would take 17 GB.
#[test]
fn a_long_sequence_costs_what_it_sees() {
    let length = 1 << 16;
    let x = Array::ones::<f32>(&[1, length, 1, 4]).unwrap();
    let ones = Tensor::of(&x);
    let tolerance = Tolerance::of(FLASH, Dtype::Float32);
    let y = bigbird_attention(&x, &x, &x, BigBirdAttentionOptions::default()).unwrap();
    assert_close("bigbird_attention", &y, &ones, tolerance);
    let options =
        LongformerAttentionOptions { window: 32, global_tokens: &[0, 9], ..Default::default() };
    let y = longformer_attention(&x, &x, &x, options).unwrap();
    assert_close("longformer_attention", &y, &ones, tolerance);
}

#[test]
fn bad_blocks_are_named() {
    let op = "block_sparse_attention";
    let blocks = BlockLayout::new(4, 2, vec![vec![0], vec![1]]).unwrap();
    check_refusals(op, |[q, k, v]| {
        block_sparse_attention(q, k, v, BlockSparseAttentionOptions::new(&blocks))
    });
    let x = zeros(&[2, 5, 4, 8]);
    let with = |options| refusal(block_sparse_attention(&x, &x, &x, options));
    let other = BlockLayout::new(4, 2, vec![vec![0]]).unwrap();
    assert_eq!(
        with(BlockSparseAttentionOptions::new(&other)),
        format!("[{op}] blocks must have 2 rows but got 1")
    );
    let other = BlockLayout::new(4, 3, vec![vec![0], vec![1]]).unwrap();
    assert_eq!(
        with(BlockSparseAttentionOptions::new(&other)),
        format!("[{op}] blocks must have 2 blocks of keys but got 3")
    );
    let scale = Some(f32::NAN);
    assert_eq!(
        with(BlockSparseAttentionOptions { scale, ..BlockSparseAttentionOptions::new(&blocks) }),
        format!("[{op}] scale must be finite but got NaN")
    );
}

fn bigbird(options: BigBirdAttentionOptions, inputs: [&Tensor; 3]) -> Tensor {
    let lengths = [inputs[0].shape[1], inputs[1].shape[1]];
    let [queries, keys] = lengths.map(|length| length as i32);
    // The blocks themselves are tested with the patterns.
    let blocks = options.pattern().layout(options.block_size, queries, keys).unwrap();
    let size = options.block_size as usize;
    attend_visible(inputs, options.scale.map(f64::from), |i, j| {
        sees(blocks.rows(), size, i, j) && !later(options.causal, lengths, i, j)
    })
}

#[test]
fn bigbird_matches_the_oracle() {
    for (window_blocks, global_blocks, random_blocks) in [(1, 2, 3), (0, 1, 1), (1, 0, 0)] {
        let options = BigBirdAttentionOptions {
            block_size: 4,
            window_blocks,
            global_blocks,
            random_blocks,
            seed: 5,
            ..Default::default()
        };
        check_all_as(
            FLASH,
            "bigbird_attention",
            |inputs, causal| bigbird(BigBirdAttentionOptions { causal, ..options }, inputs),
            |[q, k, v], layout, causal| {
                bigbird_attention(q, k, v, BigBirdAttentionOptions { causal, layout, ..options })
            },
        );
    }
}

#[test]
fn bigbird_covers_all_where_it_is_short() {
    let inputs = inputs([1, 2, 1, 100, 100, 8, 8], Dtype::Float32);
    let y = bigbird_attention(&inputs[0], &inputs[1], &inputs[2], Default::default()).unwrap();
    let expected = attend_visible(tensors(&inputs).each_ref(), None, |_, _| true);
    assert_close("two blocks", &y, &expected, Tolerance::of(FLASH, Dtype::Float32));
}

#[test]
fn gradients_of_bigbird_match_finite_differences() {
    let options = BigBirdAttentionOptions {
        block_size: 2,
        window_blocks: 0,
        global_blocks: 1,
        random_blocks: 1,
        causal: true,
        ..Default::default()
    };
    assert_gradients(
        "bigbird_attention",
        &tensors(&inputs([1, 2, 1, 9, 9, 3, 2], Dtype::Float32)),
        |inputs| bigbird(options, [&inputs[0], &inputs[1], &inputs[2]]),
        |inputs| bigbird_attention(&inputs[0], &inputs[1], &inputs[2], options),
    );
}

#[test]
fn bad_arguments_of_bigbird_are_named() {
    let op = "bigbird_attention";
    check_refusals(op, |[q, k, v]| bigbird_attention(q, k, v, Default::default()));
    let x = zeros(&[2, 5, 4, 8]);
    let with = |options| refusal(bigbird_attention(&x, &x, &x, options));
    let of = BigBirdAttentionOptions::default;
    let form = format!("[{op}]");
    for size in [0, -1] {
        assert_eq!(
            with(BigBirdAttentionOptions { block_size: size, ..of() }),
            format!("{form} block_size must be at least 1 but got {size}")
        );
    }
    let negative = "must be at least 0 but got -1";
    assert_eq!(
        with(BigBirdAttentionOptions { window_blocks: -1, ..of() }),
        format!("{form} window_blocks {negative}")
    );
    assert_eq!(
        with(BigBirdAttentionOptions { global_blocks: -1, ..of() }),
        format!("{form} global_blocks {negative}")
    );
    assert_eq!(
        with(BigBirdAttentionOptions { random_blocks: -1, ..of() }),
        format!("{form} random_blocks {negative}")
    );
    assert_eq!(
        with(BigBirdAttentionOptions { scale: Some(f32::INFINITY), ..of() }),
        format!("{form} scale must be finite but got inf")
    );
}

/// Rows of global tokens by `global`, all others by the window and the global columns.
fn longformer(
    inputs: [&Tensor; 3],
    global: [&Tensor; 3],
    window: usize,
    tokens: &[i32],
    scale: Option<f64>,
) -> Tensor {
    let is_global = |i: usize| tokens.contains(&(i as i32));
    let near = attend_visible(inputs, scale, |i, j| i.abs_diff(j) <= window || is_global(j));
    let far = attend_visible(global, scale, |_, _| true);
    Tensor::from_fn(
        &near.shape,
        |index| if is_global(index[1]) { far.at(index) } else { near.at(index) },
    )
}

fn swap(layout: Layout, inputs: &[Array]) -> Vec<Array> {
    let swap =
        |x: &Array| if layout == Layout::Bhsd { x.swap_axes(1, 2).unwrap() } else { x.clone() };
    inputs.iter().map(swap).collect()
}

#[test]
fn longformer_matches_the_oracle() {
    for shape in [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 2, 2, 3, 3, 8, 8],
        [1, 0, 0, 3, 3, 8, 8],
        [1, 2, 2, 0, 0, 8, 8],
        [1, 2, 2, 3, 3, 8, 0],
        [2, 4, 2, 63, 63, 8, 5],
        [1, 2, 1, 65, 65, 16, 32],
        [1, 2, 2, 130, 130, 8, 8],
    ] {
        let length = shape[3];
        let all = [0, 7, 62, 7, 40].into_iter().filter(|&token| token < length).collect::<Vec<_>>();
        for dtype in crate::support::FLOATING {
            let inputs = inputs(shape, dtype);
            for (window, tokens) in [(0, &all[..]), (3, &[]), (17, &all), (20, &all), (500, &all)] {
                let of = tensors(&inputs);
                let expected = longformer(of.each_ref(), of.each_ref(), window, tokens, None);
                for layout in [Layout::Bshd, Layout::Bhsd] {
                    let what =
                        format!("longformer {shape:?} {dtype:?} {window} {tokens:?} {layout:?}");
                    let x = swap(layout, &inputs);
                    let options = LongformerAttentionOptions {
                        window: window as i32,
                        global_tokens: tokens,
                        layout,
                        ..Default::default()
                    };
                    let y = longformer_attention(&x[0], &x[1], &x[2], options).unwrap();
                    assert_eq!(y.dtype(), dtype, "{what}");
                    let y = swap(layout, &[y]).remove(0);
                    assert_close(&what, &y, &expected, Tolerance::of(FLASH, dtype));
                }
            }
        }
    }
}

#[test]
fn global_tokens_may_have_projections_of_their_own() {
    let inputs = inputs([2, 4, 2, 33, 33, 8, 5], Dtype::Float32);
    let [q, k, v] = inputs.each_ref().map(|x| x.multiply(Array::from_f32(-0.7)).unwrap());
    let of = tensors(&inputs);
    let global = [&q, &k, &v].map(Tensor::of);
    let expected = longformer(of.each_ref(), global.each_ref(), 4, &[3, 20], Some(0.4));
    // What is named twice is one token, of which the last query counts.
    let q = q.take_axis(Array::from_slice(&[5, 3, 20], &[3]), 1).unwrap();
    let options = LongformerAttentionOptions {
        window: 4,
        global_tokens: &[20, 3, 20],
        global: Some(LongformerGlobal { queries: &q, keys: &k, values: &v }),
        scale: Some(0.4),
        ..Default::default()
    };
    let y = longformer_attention(&inputs[0], &inputs[1], &inputs[2], options).unwrap();
    assert_close("global projections", &y, &expected, Tolerance::of(FLASH, Dtype::Float32));
}

#[test]
fn gradients_of_longformer_match_finite_differences() {
    let base = tensors(&inputs([1, 2, 1, 6, 6, 3, 2], Dtype::Float32));
    let mut all = base.to_vec();
    all.extend(
        base.iter().map(|t| Tensor::new(&t.shape, t.values.iter().map(|x| 0.5 - x).collect())),
    );
    assert_gradients(
        "longformer_attention",
        &all,
        |x| longformer([&x[0], &x[1], &x[2]], [&x[3], &x[4], &x[5]], 1, &[2], None),
        |x| {
            let queries = x[3].take_axis(Array::from_slice(&[2], &[1]), 1)?;
            let options = LongformerAttentionOptions {
                window: 1,
                global_tokens: &[2],
                global: Some(LongformerGlobal { queries: &queries, keys: &x[4], values: &x[5] }),
                ..Default::default()
            };
            longformer_attention(&x[0], &x[1], &x[2], options)
        },
    );
}

#[test]
fn bad_arguments_of_longformer_are_named() {
    let op = "longformer_attention";
    check_refusals(op, |[q, k, v]| longformer_attention(q, k, v, Default::default()));
    let x = zeros(&[2, 5, 4, 8]);
    let of = LongformerAttentionOptions::default;
    let with = |options: LongformerAttentionOptions<'_>| {
        refusal(longformer_attention(&x, &x, &x, options))
    };
    let shorter = zeros(&[2, 4, 4, 8]);
    assert_eq!(
        refusal(longformer_attention(&x, &shorter, &shorter, of())),
        format!("[{op}] keys must have shape [2, 5, 4, 8] but got [2, 4, 4, 8]")
    );
    assert_eq!(
        with(LongformerAttentionOptions { window: -1, ..of() }),
        format!("[{op}] window must be at least 0 but got -1")
    );
    for token in [-1, 5, i32::MAX] {
        let global_tokens = &[0, token];
        assert_eq!(
            with(LongformerAttentionOptions { global_tokens, ..of() }),
            format!("[{op}] global_tokens must be from 0 to below 5 but got {token}")
        );
    }
    assert_eq!(
        with(LongformerAttentionOptions { scale: Some(f32::NAN), ..of() }),
        format!("[{op}] scale must be finite but got NaN")
    );
    let half = x.as_dtype(Dtype::Float16).unwrap();
    let one = zeros(&[2, 1, 4, 8]);
    let global = |queries, keys, values| {
        let global = Some(LongformerGlobal { queries, keys, values });
        with(LongformerAttentionOptions { global, global_tokens: &[3], ..of() })
    };
    let form = "must have shape [2, 5, 4, 8] but got [2, 4, 4, 8]";
    let of_one = "must have shape [2, 1, 4, 8] but got [2, 5, 4, 8]";
    assert_eq!(global(&x, &x, &x), format!("[{op}] global.queries {of_one}"));
    assert_eq!(global(&one, &shorter, &x), format!("[{op}] global.keys {form}"));
    assert_eq!(global(&one, &x, &shorter), format!("[{op}] global.values {form}"));
    let dtype = "must have dtype Float32 but got Float16";
    assert_eq!(global(&one, &half, &x), format!("[{op}] global.keys {dtype}"));
}

use mlx_primitives::{
    Dispatch, Error, Result,
    attention::{PagedAttentionOptions, Window, paged_attention, paged_attention_with_lse},
};
use mlx_rs::{Array, Dtype, ops::indexing::IndexOp};

use super::row::{self, Rule};
use crate::support::{
    FLOATING,
    backends::{on_backends, on_each_backend, with_kernels},
    compare::{Tolerance, assert_close},
    gradient::gradients_on_each_backend,
    sample::{Random, normal, strided},
    tensor::Tensor,
};

const OP: &str = "paged_attention";

/// How blocks hold numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Plain,
    Int8,
    Fp8,
}

/// A pool, and sequences as queries and keys of each.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// Heads, kv_heads, size, value_size.
    heads: [i32; 4],
    block: i32,
    sequences: &'static [(i32, i32)],
    /// Whether sequences without exactly one query are told where theirs start.
    one_each: bool,
    /// Queries of no sequence.
    padding: i32,
    /// Of keys and of values.
    forms: [Form; 2],
    scales_by_block: bool,
    causal: bool,
    window: [Option<i32>; 2],
    scale: Option<f32>,
    soft_cap: Option<f32>,
    alibi: bool,
    sinks: bool,
    strided: bool,
}

const fn case(
    name: &'static str,
    heads: [i32; 4],
    block: i32,
    sequences: &'static [(i32, i32)],
) -> Case {
    Case {
        name,
        heads,
        block,
        sequences,
        one_each: false,
        padding: 0,
        forms: [Form::Plain; 2],
        scales_by_block: false,
        causal: true,
        window: [None, None],
        scale: None,
        soft_cap: None,
        alibi: false,
        sinks: false,
        strided: false,
    }
}

const fn decode(
    name: &'static str,
    heads: [i32; 4],
    block: i32,
    sequences: &'static [(i32, i32)],
) -> Case {
    Case { one_each: true, ..case(name, heads, block, sequences) }
}

const MIXED: &[(i32, i32)] = &[(1, 20), (5, 5), (0, 9), (7, 33), (1, 1)];
const TOKENS: &[(i32, i32)] = &[(1, 17), (1, 1), (1, 16), (1, 40)];

const CASES: &[Case] = &[
    decode("one of everything", [1, 1, 1, 1], 1, &[(1, 1)]),
    decode("odd sizes", [2, 1, 5, 3], 3, &[(1, 7), (1, 4)]),
    decode("blocks of 8", [4, 2, 64, 64], 8, TOKENS),
    decode("blocks of 16", [4, 2, 64, 64], 16, TOKENS),
    decode("blocks of 32", [4, 2, 64, 64], 32, TOKENS),
    decode("blocks of 64", [4, 2, 64, 64], 64, TOKENS),
    decode("groups of 9", [9, 1, 32, 32], 16, TOKENS),
    decode("head size 80", [2, 2, 80, 80], 16, TOKENS),
    decode("head size 128", [4, 1, 128, 128], 16, TOKENS),
    decode("head size 256", [2, 1, 256, 256], 8, &[(1, 17)]),
    decode("values of another size", [2, 1, 64, 40], 16, TOKENS),
    decode("no context", [4, 2, 64, 64], 16, &[(1, 0), (1, 5), (1, 0)]),
    decode("in parts", [2, 1, 16, 16], 16, &[(1, 270), (1, 20), (1, 0), (1, 257)]),
    decode("one long sequence", [1, 1, 8, 8], 64, &[(1, 2049)]),
    case("prompts and tokens", [4, 2, 64, 64], 8, MIXED),
    case("prompts of 9 heads", [9, 3, 32, 32], 8, MIXED),
    case("a prompt that goes on", [4, 1, 32, 32], 16, &[(20, 50), (3, 3)]),
    case("more queries than keys", [2, 1, 32, 32], 8, &[(9, 4), (2, 0)]),
    Case { padding: 3, ..case("queries of no sequence", [4, 2, 32, 32], 8, MIXED) },
    Case { padding: 3, sinks: true, ..case("sinks and such queries", [4, 2, 32, 32], 8, MIXED) },
    Case { causal: false, ..case("not causal", [4, 2, 32, 32], 8, MIXED) },
    Case { window: [Some(3), None], ..case("window", [4, 2, 32, 32], 8, MIXED) },
    Case {
        window: [Some(100), None],
        ..decode("window in parts", [2, 1, 16, 16], 16, &[(1, 500)])
    },
    Case {
        causal: false,
        window: [Some(2), Some(1)],
        ..case("window both ways", [4, 2, 32, 32], 8, MIXED)
    },
    Case { scale: Some(-0.5), ..case("negative scale", [4, 2, 32, 32], 8, MIXED) },
    Case { soft_cap: Some(0.7), ..case("soft cap", [4, 2, 32, 32], 8, MIXED) },
    Case { alibi: true, ..case("ALiBi", [4, 2, 32, 32], 8, MIXED) },
    Case { sinks: true, ..case("sinks", [4, 2, 32, 32], 8, MIXED) },
    Case { sinks: true, ..decode("sinks beside parts", [2, 1, 16, 16], 16, &[(1, 300), (1, 0)]) },
    Case { strided: true, ..case("a pool of all layers", [4, 2, 32, 32], 8, MIXED) },
    Case { forms: [Form::Int8; 2], ..case("int8", [4, 2, 64, 64], 8, MIXED) },
    Case {
        forms: [Form::Int8; 2],
        scales_by_block: true,
        ..case("int8, a scale a block", [4, 2, 64, 32], 8, MIXED)
    },
    Case {
        forms: [Form::Int8; 2],
        ..decode("int8 in parts", [2, 1, 40, 24], 16, &[(1, 300), (1, 20)])
    },
    Case { forms: [Form::Fp8; 2], ..case("fp8", [4, 2, 64, 64], 8, MIXED) },
    Case {
        forms: [Form::Fp8; 2],
        scales_by_block: true,
        ..case("fp8, a scale a block", [4, 2, 32, 64], 16, MIXED)
    },
    Case { forms: [Form::Int8, Form::Plain], ..case("int8 keys", [4, 2, 64, 64], 8, MIXED) },
    Case { forms: [Form::Plain, Form::Int8], ..case("int8 values", [4, 2, 64, 40], 8, MIXED) },
    Case {
        forms: [Form::Plain, Form::Fp8],
        ..decode("fp8 values in parts", [2, 1, 40, 24], 16, &[(1, 300), (1, 20)])
    },
    Case {
        forms: [Form::Int8, Form::Fp8],
        scales_by_block: true,
        ..case("int8 keys and fp8 values", [4, 2, 64, 32], 16, MIXED)
    },
    Case {
        forms: [Form::Fp8, Form::Int8],
        ..decode("and the other way", [9, 1, 32, 32], 16, TOKENS)
    },
    Case {
        window: [Some(200), None],
        soft_cap: Some(2.0),
        alibi: true,
        sinks: true,
        forms: [Form::Int8; 2],
        ..decode("everything", [6, 2, 32, 16], 16, &[(1, 270), (1, 3), (1, 0)])
    },
];

struct Inputs {
    queries: Array,
    blocks: [Array; 2],
    tables: Array,
    lengths: Array,
    starts: Option<Array>,
    /// Of keys and of values.
    scales: [Option<Array>; 2],
    slopes: Option<Array>,
    sinks: Option<Array>,
    /// The numbers that blocks stand for, at the place of each key of each sequence: `[key][head]`.
    rows: [Vec<Vec<Vec<Vec<f64>>>>; 2],
}

impl Case {
    fn width(&self) -> i32 {
        // One more than any sequence needs.
        self.sequences.iter().map(|&(_, keys)| (keys + self.block - 1) / self.block).max().unwrap()
            + 1
    }

    fn queries(&self) -> i32 {
        self.sequences.iter().map(|(queries, _)| queries).sum::<i32>() + self.padding
    }

    /// Blocks of random places in the pool; entries beyond a sequence's last block name none.
    fn tables(&self) -> (Vec<Vec<i32>>, i32) {
        let mut random = Random::new(11);
        let width = self.width();
        let blocks = self.sequences.len() as i32 * width + 2;
        let mut free: Vec<_> = (0..blocks).collect();
        let table = |&(_, keys): &(i32, i32)| {
            let needed = (keys + self.block - 1) / self.block;
            let entry = |w: i32| match w < needed {
                true => free.swap_remove(random.below(free.len())),
                false => [-1, i32::MIN, i32::MAX, blocks][random.below(4)],
            };
            (0..width).map(entry).collect()
        };
        (self.sequences.iter().map(table).collect(), blocks)
    }

    fn inputs(&self, dtype: Dtype) -> Inputs {
        let [heads, kv_heads, size, value_size] = self.heads;
        let (tables, blocks) = self.tables();
        let pool = |seed, size, form| {
            self.pool(seed, [blocks, self.block, kv_heads, size], form, dtype, &tables)
        };
        let (key_blocks, key_scales, key_rows) = pool(2, size, self.forms[0]);
        let (value_blocks, value_scales, value_rows) = pool(3, value_size, self.forms[1]);
        let starts = self.sequences.iter().scan(0, |start, (queries, _)| {
            *start += queries;
            Some(*start)
        });
        let starts: Vec<_> = std::iter::once(0).chain(starts).collect();
        let lengths: Vec<_> = self.sequences.iter().map(|&(_, keys)| keys).collect();
        let count = lengths.len() as i32;
        let lies = |array: Array| if self.strided { strided(&array) } else { array };
        Inputs {
            queries: lies(normal(1, &[self.queries(), heads, size], dtype)),
            blocks: [key_blocks, value_blocks],
            tables: lies(Array::from_slice(&tables.concat(), &[count, self.width()])),
            lengths: lies(Array::from_slice(&lengths, &[count])),
            starts: (!self.one_each).then(|| lies(Array::from_slice(&starts, &[count + 1]))),
            scales: [key_scales, value_scales],
            slopes: self.alibi.then(|| normal(4, &[heads], Dtype::Float32).abs().unwrap()),
            sinks: self.sinks.then(|| normal(5, &[heads], Dtype::Float32)),
            rows: [key_rows, value_rows],
        }
    }

    /// A pool in which all that no sequence holds is NaN, or the largest number there is; its scales; and what it stands for.
    #[allow(clippy::type_complexity, reason = "rows by sequence, key and head")]
    fn pool(
        &self,
        seed: u64,
        shape: [i32; 4],
        form: Form,
        dtype: Dtype,
        tables: &[Vec<i32>],
    ) -> (Array, Option<Array>, Vec<Vec<Vec<Vec<f64>>>>) {
        let [blocks, block, kv_heads, size] = shape;
        let numbers = normal(seed, &shape, Dtype::Float32);
        let stored = match form {
            Form::Plain => numbers.as_dtype(dtype).unwrap(),
            Form::Int8 => {
                let scaled = numbers.multiply(Array::from_f32(30.0)).unwrap();
                scaled.round(0).unwrap().as_dtype(Dtype::Int8).unwrap()
            }
            Form::Fp8 => numbers.to_fp8().unwrap(),
        };
        let value = match form {
            Form::Fp8 => stored.from_fp8(Dtype::Float32).unwrap(),
            _ => stored.clone(),
        };
        let value = Tensor::of(&value);
        let scales = (form != Form::Plain).then(|| {
            let rows = if self.scales_by_block { 1 } else { block };
            let scales = normal(seed + 10, &[blocks, rows, kv_heads], Dtype::Float32);
            scales.abs().unwrap().multiply(Array::from_f32(0.05)).unwrap()
        });
        let scale_of = scales.as_ref().map(Tensor::of);
        let mut held = vec![false; (blocks * block) as usize];
        let row = |b: i32, slot: i32, head: i32| -> Vec<f64> {
            let [b, slot, head] = [b, slot, head].map(|index| index as usize);
            let scale = scale_of.as_ref().map_or(1.0, |scales| {
                scales.at(&[b, if self.scales_by_block { 0 } else { slot }, head])
            });
            (0..size as usize).map(|d| scale * value.at(&[b, slot, head, d])).collect()
        };
        let sequence = |(table, &(_, keys)): (&Vec<i32>, &(i32, i32))| {
            let key = |j: i32| {
                let (b, slot) = (table[(j / block) as usize], j % block);
                held[(b * block + slot) as usize] = true;
                (0..kv_heads).map(|head| row(b, slot, head)).collect()
            };
            (0..keys).map(key).collect()
        };
        let rows = tables.iter().zip(self.sequences).map(sequence).collect();
        (self.poisoned(&stored, &held, form), scales, rows)
    }

    fn poisoned(&self, stored: &Array, held: &[bool], form: Form) -> Array {
        let [blocks, block] = [stored.dim(0), stored.dim(1)];
        let held: Vec<_> = held.iter().map(|&held| u8::from(held)).collect();
        let held = Array::from_slice(&held, &[blocks, block, 1, 1]).as_dtype(Dtype::Bool).unwrap();
        let poison = match form {
            Form::Plain => Array::from_f32(f32::NAN).as_dtype(stored.dtype()).unwrap(),
            Form::Int8 => Array::from_int(127).as_dtype(Dtype::Int8).unwrap(),
            Form::Fp8 => Array::from_int(0x7f).as_dtype(Dtype::Uint8).unwrap(),
        };
        let poisoned = mlx_rs::ops::select(held, stored, &poison).unwrap();
        if !self.strided {
            return poisoned;
        }
        // The second of three layers.
        let other = mlx_rs::ops::full_like(&poisoned, &poison, poisoned.dtype()).unwrap();
        mlx_rs::ops::stack(&[&other, &poisoned, &other], 0).unwrap().index(1)
    }

    fn run(&self, inputs: &Inputs, dispatch: Dispatch) -> Result<(Array, Array)> {
        let Inputs { queries, blocks: [keys, values], tables, lengths, .. } = inputs;
        let options = self.options(inputs, dispatch);
        paged_attention_with_lse(queries, keys, values, tables, lengths, options)
    }

    /// The first of [`Self::run`], which is the same by itself, and the second.
    fn run_twice(&self, inputs: &Inputs, dispatch: Dispatch) -> Result<(Array, Array)> {
        let (seen, lse) = self.run(inputs, dispatch)?;
        let Inputs { queries, blocks: [keys, values], tables, lengths, .. } = inputs;
        let options = self.options(inputs, dispatch);
        let alone = paged_attention(queries, keys, values, tables, lengths, options)?;
        assert_close(self.name, &alone, &Tensor::of(&seen), Tolerance::EXACT);
        Ok((alone, lse))
    }

    fn options<'a>(&self, inputs: &'a Inputs, dispatch: Dispatch) -> PagedAttentionOptions<'a> {
        PagedAttentionOptions {
            query_starts: inputs.starts.as_ref(),
            scale: self.scale,
            soft_cap: self.soft_cap,
            alibi_slopes: inputs.slopes.as_ref(),
            causal: self.causal,
            window: Window { left: self.window[0], right: self.window[1] },
            sinks: inputs.sinks.as_ref(),
            key_scales: inputs.scales[0].as_ref(),
            value_scales: inputs.scales[1].as_ref(),
            dispatch,
        }
    }

    /// `[T, H, D_v]` and `[T, H]`.
    fn expected(&self, inputs: &Inputs) -> (Tensor, Tensor) {
        let [heads, kv_heads, size, value_size] = self.heads.map(|size| size as usize);
        let queries = Tensor::of(&inputs.queries);
        let [slopes, sinks] =
            [&inputs.slopes, &inputs.sinks].map(|array| array.as_ref().map(Tensor::of));
        let right = if self.causal { Some(0) } else { self.window[1] };
        let (mut output, mut lse, mut token) = (Vec::new(), Vec::new(), 0);
        for (c, &(count, keys)) in self.sequences.iter().enumerate() {
            for i in 0..count {
                for h in 0..heads {
                    let rule = Rule {
                        scale: self.scale.map_or(1.0 / (size as f64).sqrt(), f64::from),
                        cap: self.soft_cap.map(f64::from),
                        slope: slopes.as_ref().map_or(0.0, |slopes| slopes.at(&[h])),
                        window: [self.window[0], right].map(|side| side.map(i64::from)),
                        sink: sinks.as_ref().map(|sinks| sinks.at(&[h])),
                    };
                    let of = |rows: &'_ [Vec<Vec<Vec<f64>>>]| -> Vec<Vec<f64>> {
                        rows[c]
                            .iter()
                            .map(|heads_of| heads_of[h / (heads / kv_heads)].clone())
                            .collect()
                    };
                    let (key_rows, value_rows) = (of(&inputs.rows[0]), of(&inputs.rows[1]));
                    let [key_rows, value_rows] = [&key_rows, &value_rows]
                        .map(|rows| rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
                    let start = (token * heads + h) * size;
                    let (average, sum) = row::attend(
                        &queries.values[start..start + size],
                        &key_rows,
                        &value_rows,
                        i64::from(i + keys - count),
                        value_size,
                        rule,
                    );
                    output.extend(average);
                    lse.push(sum);
                }
                token += 1;
            }
        }
        let padding = self.padding as usize * heads;
        output.extend(vec![0.0; padding * value_size]);
        let empty = |h: usize| sinks.as_ref().map_or(f64::NEG_INFINITY, |sinks| sinks.at(&[h]));
        lse.extend((0..padding).map(|row| empty(row % heads)));
        let count = queries.shape[0];
        (Tensor::new(&[count, heads, value_size], output), Tensor::new(&[count, heads], lse))
    }
}

#[test]
fn every_backend_matches_the_oracle() {
    for (turn, case) in CASES.iter().enumerate() {
        for (i, dtype) in FLOATING.into_iter().enumerate() {
            let inputs = case.inputs(dtype);
            let (expected, expected_lse) = case.expected(&inputs);
            on_backends(
                with_kernels(turn % 3 == i),
                OP,
                |dispatch| case.run_twice(&inputs, dispatch),
                |backend, (y, lse)| {
                    let what = format!("{OP} {} {dtype:?} on {backend}", case.name);
                    assert_eq!((y.dtype(), lse.dtype()), (dtype, Dtype::Float32), "{what}");
                    assert_close(&what, &y, &expected, Tolerance::of("decode", dtype));
                    let what = format!("log-sum-exp of {what}");
                    assert_close(
                        &what,
                        &lse,
                        &expected_lse,
                        Tolerance::of("decode", Dtype::Float32),
                    );
                },
            );
        }
    }
}

#[test]
fn contexts_beyond_their_tables_and_strange_starts_are_survived() {
    let case = case("strange", [4, 2, 32, 32], 8, MIXED);
    let inputs = case.inputs(Dtype::Float16);
    let count = inputs.lengths.dim(0);
    for (lengths, starts) in [
        ([i32::MAX, i32::MIN, -1, 1 << 30, 3], [0, 1, 6, 6, 13, 14]),
        ([20, 5, 9, 33, 1], [5, 3, -7, i32::MAX, i32::MIN, 2]),
        ([20, 5, 9, 33, 1], [i32::MAX; 6]),
    ] {
        let strange = Inputs {
            lengths: Array::from_slice(&lengths, &[count]),
            starts: Some(Array::from_slice(&starts, &[count + 1])),
            // Any entry names a block here.
            tables: inputs.tables.clone(),
            ..case.inputs(Dtype::Float16)
        };
        on_each_backend(OP, |dispatch| case.run(&strange, dispatch), |_, (y, _)| y.eval().unwrap());
    }
}

#[test]
fn gradients_match_finite_differences() {
    // One sequence of 5 keys in the blocks 1 and 0, of which a slot is left over.
    let tables = Array::from_slice(&[1, 0], &[1, 2]);
    let lengths = Array::from_slice(&[5], &[1]);
    let starts = Array::from_slice(&[0, 2], &[2]);
    let inputs = [[2, 4, 3].as_slice(), &[2, 3, 2, 3], &[2, 3, 2, 2]];
    let inputs =
        (1..).zip(inputs).map(|(seed, shape)| Tensor::of(&normal(seed, shape, Dtype::Float32)));
    let oracle = |tensors: &[Tensor]| {
        let mut output = Vec::new();
        for (i, h) in (0..2).flat_map(|i| (0..4).map(move |h| (i, h))) {
            let rows = |tensor: &'_ Tensor| -> Vec<Vec<f64>> {
                let row = |j: usize| {
                    let (block, slot) = ([1, 0][j / 3], j % 3);
                    let size = tensor.shape[3];
                    (0..size).map(|d| tensor.at(&[block, slot, h / 2, d])).collect()
                };
                (0..5).map(row).collect()
            };
            let (keys, values) = (rows(&tensors[1]), rows(&tensors[2]));
            let [keys, values] =
                [&keys, &values].map(|rows| rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let query: Vec<_> = (0..3).map(|d| tensors[0].at(&[i, h, d])).collect();
            let rule = Rule {
                scale: 3.0_f64.sqrt().recip(),
                cap: None,
                slope: 0.0,
                window: [None, Some(0)],
                sink: None,
            };
            output.extend(row::attend(&query, &keys, &values, i as i64 + 3, 2, rule).0);
        }
        Tensor::new(&[2, 4, 2], output)
    };
    gradients_on_each_backend(OP, &inputs.collect::<Vec<_>>(), oracle, |arrays, dispatch| {
        let options =
            PagedAttentionOptions { query_starts: Some(&starts), dispatch, ..Default::default() };
        paged_attention(&arrays[0], &arrays[1], &arrays[2], &tables, &lengths, options)
    });
}

#[test]
fn an_empty_problem_has_an_answer() {
    let queries = Array::ones::<f32>(&[2, 4, 8]).unwrap();
    let sinks = normal(1, &[4], Dtype::Float32);
    for (blocks, width) in [(0, 3), (3, 0)] {
        let pool = Array::zeros::<f32>(&[blocks, 8, 2, 8]).unwrap();
        let tables = Array::zeros::<i32>(&[2, width]).unwrap();
        let lengths = Array::zeros::<i32>(&[2]).unwrap();
        let options = PagedAttentionOptions { sinks: Some(&sinks), ..Default::default() };
        let (y, lse) =
            paged_attention_with_lse(&queries, &pool, &pool, &tables, &lengths, options).unwrap();
        assert_close("nothing", &y, &Tensor::from_fn(&[2, 4, 8], |_| 0.0), Tolerance::EXACT);
        let sinks = Tensor::of(&sinks);
        let expected = Tensor::from_fn(&[2, 4], |index| sinks.at(&index[1..]));
        assert_close("its log-sum-exp", &lse, &expected, Tolerance::EXACT);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let queries = Array::ones::<f32>(&[2, 4, 8]).unwrap();
    let pool = Array::ones::<f32>(&[3, 8, 2, 8]).unwrap();
    let tables = Array::zeros::<i32>(&[2, 2]).unwrap();
    let lengths = Array::zeros::<i32>(&[2]).unwrap();
    let call = |queries: &Array, pool: &Array, tables: &Array, options: PagedAttentionOptions| {
        let result = paged_attention(queries, pool, pool, tables, &lengths, options);
        result.err().map(|error: Error| error.to_string()).unwrap_or_default()
    };
    let none = PagedAttentionOptions::default;
    assert_eq!(call(&queries, &pool, &tables, none()), "");
    assert_eq!(
        call(&queries.index((..1, .., ..)), &pool, &tables, none()),
        "[paged_attention] queries must have one query for each of N = 2 sequences but got 1"
    );
    assert_eq!(
        call(&queries, &pool.index((.., .., .., ..7)), &tables, none()),
        "[paged_attention] key_blocks must have shape [BLOCKS, BLOCK, H_kv, 8] but got [3, 8, 2, 7]"
    );
    assert_eq!(
        call(&queries.index((.., ..3, ..)), &pool, &tables, none()),
        "[paged_attention] queries must have a multiple of H_kv = 2 heads but got 3"
    );
    assert_eq!(
        call(&queries, &pool, &tables.as_dtype(Dtype::Int64).unwrap(), none()),
        "[paged_attention] block_tables must have dtype Int32 but got Int64"
    );
    let bytes = pool.as_dtype(Dtype::Int8).unwrap();
    assert_eq!(
        call(&queries, &bytes, &tables, none()),
        "[paged_attention] key_scales must be given for blocks of 8 bits but got none"
    );
    let scales = Array::ones::<f32>(&[3, 8, 2]).unwrap();
    let few = Array::ones::<f32>(&[3, 2, 2]).unwrap();
    let scaled =
        |key_scales, value_scales| PagedAttentionOptions { key_scales, value_scales, ..none() };
    assert_eq!(call(&queries, &bytes, &tables, scaled(Some(&scales), Some(&scales))), "");
    assert_eq!(
        call(&queries, &bytes, &tables, scaled(Some(&scales), None)),
        "[paged_attention] value_scales must be given for blocks of 8 bits but got none"
    );
    assert_eq!(
        call(&queries, &pool, &tables, scaled(Some(&scales), None)),
        "[paged_attention] key_scales must be none for plain blocks but got some"
    );
    assert_eq!(
        call(&queries, &pool, &tables, scaled(None, Some(&scales))),
        "[paged_attention] value_scales must be none for plain blocks but got some"
    );
    assert_eq!(
        call(&queries, &bytes, &tables, scaled(Some(&few), Some(&scales))),
        "[paged_attention] key_scales must have shape [3, 8, 2] but got [3, 2, 2]"
    );
    let half = pool.as_dtype(Dtype::Float16).unwrap();
    assert_eq!(
        call(&queries, &half, &tables, none()),
        "[paged_attention] key_blocks must have dtype Float32 or Int8 or Uint8 but got Float16"
    );
    let window = Window { left: Some(-1), right: None };
    assert_eq!(
        call(&queries, &pool, &tables, PagedAttentionOptions { window, ..none() }),
        "[paged_attention] window.left must be at least 0 but got -1"
    );
    assert_eq!(
        call(&queries, &pool, &tables, PagedAttentionOptions { soft_cap: Some(0.0), ..none() }),
        "[paged_attention] soft_cap must be finite and above 0 but got 0"
    );
}

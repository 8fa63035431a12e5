//! Random arguments, most of them odd: a call answers what is documented or refuses in words.
//!
//! A signal ends the test binary; `--nocapture` shows which seed raised it.

use Dtype::*;
use mlx_primitives::{Backend, Dispatch, Error, Layout, Result};
use mlx_primitives::{activation::*, attention::*, cache::*, layers::*, norm::*};
use mlx_primitives::{quant::*, rope::*, sampling::*, ssm::*};
use mlx_rs::{
    Array, Dtype, StreamOrDevice, builder::Builder, module::Module, ops::broadcast_to, with_stream,
};

mod caches;
mod chains;
mod scans;

use self::chains::chains;
use self::scans::{scans, scans_of_states, selective_scans, state_space_layers};
use crate::support::{FLOATING, host, sample::Random, sample::strided};

const SIZES: [i32; 9] = [0, 1, 1, 2, 2, 3, 7, 33, 64];
const ODD: [Dtype; 8] = [Bool, Uint8, Uint32, Uint64, Int32, Int64, Float64, Complex64];
const INTEGERS: [i32; 9] = [0, 1, 2, 4, 64, -1, 1 << 24, i32::MIN, i32::MAX];
const NUMBERS: [f32; 10] =
    [0.0, 0.5, 1.0, -1.0, 1e-45, 1e-5, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
const STYLES: [RopeStyle; 2] = [RopeStyle::HalfSplit, RopeStyle::Interleaved];
struct Hostile(Random);

impl Hostile {
    fn pick<T: Copy>(&mut self, pool: &[T]) -> T {
        pool[self.0.below(pool.len())]
    }

    /// `usual`, and now and then another.
    fn or<T: Copy>(&mut self, usual: T, pool: &[T]) -> T {
        if self.0.below(8) == 0 { self.pick(pool) } else { usual }
    }

    fn maybe<T>(&mut self, value: T) -> Option<T> {
        self.pick(&[true, false]).then_some(value)
    }

    fn dispatch(&mut self) -> Dispatch {
        let forced = self.pick(Backend::ALL);
        self.or(Dispatch::Only(forced), &[Dispatch::Auto])
    }

    fn shape(&mut self, rank: usize) -> Vec<i32> {
        (0..rank).map(|_| self.pick(&SIZES)).collect()
    }

    /// Mostly of this shape and dtype; contiguous, strided, or one number broadcast. Made on a CPU, where every dtype is, f64
    /// among them.
    fn array(&mut self, shape: &[i32], dtype: Dtype) -> Array {
        with_stream(StreamOrDevice::cpu().as_ref(), || self.array_here(shape, dtype))
    }

    fn array_here(&mut self, shape: &[i32], dtype: Dtype) -> Array {
        let mut shape = shape.to_vec();
        match self.0.below(25) {
            0 => shape = self.pick(&[&[][..], &[0], &[2], &[1, 0, 3], &[1, 2, 1, 2, 1]]).to_vec(),
            1 => shape.iter_mut().take(2).for_each(|size| *size = self.pick(&SIZES)),
            _ => {}
        }
        let dtype = if self.0.below(25) == 0 { self.pick(&ODD) } else { dtype };
        let count = shape.iter().product::<i32>();
        if count > 0 && self.0.below(6) == 0 {
            return broadcast_to(Array::from_f32(1.5).as_dtype(dtype).unwrap(), &shape).unwrap();
        }
        let values = (0..count).map(|_| self.0.normal() as f32).collect::<Vec<_>>();
        let values = values.into_iter().map(|value| self.or(value, &NUMBERS)).collect::<Vec<_>>();
        let array = Array::from_slice(&values, &shape).as_dtype(dtype).unwrap();
        let plain = count == 0 || shape.is_empty() || !FLOATING.contains(&dtype);
        if plain || self.pick(&[true, false]) { array } else { strided(&array) }
    }
}

/// Holds an answer against its documentation, and a refusal against its form.
fn judge(op: &str, result: Result<Array>, shape: &[i32], dtype: Dtype) {
    match result {
        Ok(y) => {
            assert_eq!((y.shape(), y.dtype()), (shape, dtype), "{op}");
            y.eval().unwrap_or_else(|error| panic!("{op}: {error}"));
        }
        Err(Error::Mlx(error)) => panic!("{op}: left to MLX: {error}"),
        Err(error) => assert!(error.to_string().starts_with(&format!("[{op}] ")), "{error}"),
    }
}

fn judge_both(op: &str, result: Result<(Array, Array)>, like: [&Array; 2]) {
    let (first, second) = result.map_or_else(|e| (Err(e), None), |(y, z)| (Ok(y), Some(z)));
    judge(op, first, like[0].shape(), like[0].dtype());
    if let Some(second) = second {
        judge(op, Ok(second), like[1].shape(), like[1].dtype());
    }
}

fn with_last(x: &Array, size: i32) -> Vec<i32> {
    x.shape().split_last().map_or(Vec::new(), |(_, leading)| [leading, &[size]].concat())
}

fn norms_and_activations(hostile: &mut Hostile) {
    let (rank, dtype) = (hostile.pick(&[1, 2, 3]), hostile.pick(&FLOATING));
    let shape = hostile.shape(rank);
    let [x, up] = [0; 2].map(|_| hostile.array(&shape, dtype));
    let [weight, bias] = [0; 2].map(|_| hostile.array(&shape[rank - 1..], dtype));
    let (weight, bias) = (hostile.maybe(&weight), hostile.maybe(&bias));
    let (eps, dispatch) = (hostile.or(1e-5, &NUMBERS), hostile.dispatch());
    let y = rms_norm(&x, weight, RmsNormOptions { eps, dispatch, ..Default::default() });
    judge("rms_norm", y, x.shape(), x.dtype());
    let y = layer_norm(&x, weight, bias, LayerNormOptions { eps, dispatch });
    judge("layer_norm", y, x.shape(), x.dtype());
    let outputs = hostile.pick(&SIZES);
    let matrix = hostile.array(&[outputs, shape[rank - 1]], dtype);
    let added = hostile.array(&[outputs], dtype);
    let bias = hostile.maybe(&added);
    let options = RmsNormLinearOptions { eps, bias, dispatch, ..Default::default() };
    let y = rms_norm_linear(&x, weight.unwrap_or(&added), &matrix, options);
    let outputs = matrix.shape().first().copied().unwrap_or(0);
    judge("rms_norm_linear", y, &with_last(&x, outputs), x.dtype());
    let y = softmax(&x, SoftmaxOptions { scale: eps, dispatch });
    judge("softmax", y, x.shape(), x.dtype());
    judge("swish", swish(&x, eps), x.shape(), x.dtype());
    let activation = hostile.pick(Activation::ALL);
    judge(activation.name(), activation.apply(&x), x.shape(), x.dtype());
    let activation = hostile.pick(&[Activation::Silu, Activation::Gelu]);
    let options = GluOptions { activation, gate_bias: bias, up_bias: weight, dispatch };
    judge("glu", glu(&x, &up, options), x.shape(), x.dtype());
}

fn norms_in_company(hostile: &mut Hostile) {
    let (rank, dtype) = (hostile.pick(&[1, 2, 3]), hostile.pick(&FLOATING));
    let shape = hostile.shape(rank);
    let [x, beside] = [0; 2].map(|_| hostile.array(&shape, dtype));
    let [weight, bias] = [0; 2].map(|_| hostile.array(&shape[rank - 1..], dtype));
    let (eps, dispatch) = (hostile.or(1e-5, &NUMBERS), hostile.dispatch());
    let both = |op, result: Result<(Array, Array)>| {
        let (y, sum) = result.map_or_else(|error| (Err(error), None), |(y, s)| (Ok(y), Some(s)));
        judge(op, y, x.shape(), x.dtype());
        sum.into_iter().for_each(|sum| judge(op, Ok(sum), x.shape(), x.dtype()));
    };
    let options = RmsNormOptions { eps, dispatch, unit_offset: hostile.pick(&[true, false]) };
    both("add_rms_norm", add_rms_norm(&x, &beside, &weight, options));
    let (some, other) = (hostile.maybe(&weight), hostile.maybe(&bias));
    let options = LayerNormOptions { eps, dispatch };
    both("add_layer_norm", add_layer_norm(&x, &beside, some, other, options));
    let order = hostile.pick(&[GateOrder::GateThenNorm, GateOrder::NormThenGate]);
    let group_size = hostile.or(None, &INTEGERS.map(Some));
    let options = GatedRmsNormOptions { eps, order, group_size, dispatch };
    judge("gated_rms_norm", gated_rms_norm(&x, &beside, &weight, options), x.shape(), x.dtype());
}

fn ropes(hostile: &mut Hostile) {
    let (last, dispatch) = (hostile.pick(&[0, 2, 3, 4, 64]), hostile.dispatch());
    // Each variant of a kernel is compiled for itself, so there are to be few.
    let any = dispatch != Dispatch::Only(Backend::Kernel);
    let dtype = if any { hostile.pick(&FLOATING) } else { Float32 };
    let shape = [hostile.shape(3), vec![last]].concat();
    let (x, starts) = (hostile.array(&shape, dtype), hostile.array(&shape[..1], Int32));
    let at = RopeOffset::At(hostile.pick(&INTEGERS));
    let options = RopeOptions {
        dims: hostile.or(None, &INTEGERS.map(Some)),
        style: if any { hostile.pick(&STYLES) } else { RopeStyle::default() },
        base: hostile.or(1e4, &NUMBERS),
        frequencies: hostile.or(None, &NUMBERS.map(Some)).map(|f| vec![f.into()].into()),
        layout: hostile.pick(&[Layout::Bshd, Layout::Bhsd]),
        dispatch,
    };
    let offset = hostile.pick(&[at, RopeOffset::PerRow(&starts)]);
    judge("rope", rope(&x, offset, options.clone()), x.shape(), x.dtype());
    let mut of_keys = shape.clone();
    of_keys[options.layout.head_axis() as usize] = hostile.pick(&SIZES);
    let keys = hostile.array(&of_keys, dtype);
    let like = [&x, &keys];
    judge_both("rope_qk", rope_qk(&x, &keys, offset, options.clone()), like);
    let [weight, of_keys] = [0; 2].map(|_| hostile.array(&shape[3..], dtype));
    let (eps, unit_offset) = (hostile.or(1e-5, &NUMBERS), any && hostile.pick(&[true, false]));
    let options = QkNormRopeOptions { eps, unit_offset, rope: options };
    judge_both("qk_norm_rope", qk_norm_rope((&x, weight), (&keys, of_keys), offset, options), like);
}

fn attention(hostile: &mut Hostile) {
    let [batch, rows, keys, heads, group] = [0; 5].map(|_| hostile.pick(&SIZES).min(7));
    let [size, value_size] = [0; 2].map(|_| hostile.pick(&SIZES));
    let (dtype, mask_dtype) = (hostile.pick(&FLOATING), hostile.pick(&[Bool, Float32, Bfloat16]));
    let queries = hostile.array(&[batch, heads * group, rows, size], dtype);
    let k = hostile.array(&[batch, heads, keys, size], dtype);
    let v = hostile.array(&[batch, heads, keys, value_size], dtype);
    let full = [batch, heads * group, rows, keys].map(|axis| hostile.or(axis, &[1]));
    let first = hostile.pick(&[0, 1, 2, 3, 4]);
    let mask = hostile.array(&full[first..], mask_dtype);
    let (slopes, sinks) =
        (hostile.array(&full[1..2], Float32), hostile.array(&[heads * group], dtype));
    let [of_queries, of_keys] = [0; 2].map(|_| hostile.array(&[3], Int32));
    let key = hostile.array(&[2], Uint32);
    let dropout = AttentionDropout { probability: hostile.or(0.1, &NUMBERS), key: &key };
    let segments = Segments { queries: &of_queries, keys: &of_keys };
    let [left, right] = [0; 2].map(|_| hostile.or(None, &INTEGERS.map(Some)));
    let options = FlashAttentionOptions {
        scale: hostile.or(None, &NUMBERS.map(Some)),
        soft_cap: hostile.or(None, &NUMBERS.map(Some)),
        alibi_slopes: hostile.or(None, &[Some(&slopes)]),
        mask: hostile.maybe(&mask),
        causal: hostile.pick(&[true, false]),
        window: Window { left, right },
        segments: hostile.or(None, &[Some(segments)]),
        sinks: hostile.or(None, &[Some(&sinks)]),
        dropout: hostile.or(None, &[Some(dropout)]),
        layout: hostile.or(Layout::Bhsd, &[Layout::Bshd]),
        dispatch: hostile.dispatch(),
    };
    let shape = with_last(&queries, v.shape().last().copied().unwrap_or(0));
    let y = flash_attention(&queries, &k, &v, options.clone());
    let like = y.as_ref().ok().cloned();
    judge("flash_attention", y, &shape, queries.dtype());
    let Some(like) = like else { return };
    let axes = [0, options.layout.head_axis(), options.layout.sequence_axis()];
    let lse = Array::zeros::<f32>(&axes.map(|axis| like.dim(axis))).unwrap();
    let both = flash_attention_with_lse(&queries, k, v, options);
    judge_both("flash_attention", both, [&like, &lse]);
}

fn attention_biases(hostile: &mut Hostile) {
    let [batch, heads, rows, keys] = [0; 4].map(|_| hostile.pick(&SIZES));
    let dtype = hostile.pick(&FLOATING);
    let rank = hostile.pick(&[1, 2]);
    let slopes = hostile.array(&[batch, heads][2 - rank..], dtype);
    let (rows, keys) = (hostile.or(rows, &[-1, i32::MIN]), hostile.or(keys, &[-1, i32::MIN]));
    let options = AlibiBiasOptions { offset: hostile.or(None, &INTEGERS.map(Some)) };
    let shape = [slopes.shape(), &[rows, keys]].concat();
    judge("alibi_bias", alibi_bias(&slopes, rows, keys, options), &shape, Float32);
    let count = hostile.pick(&INTEGERS);
    judge("alibi_slopes", alibi_slopes(count), &[count], Float32);
    let positions = hostile.array(&[rows.max(0), heads], Int32);
    let options = RelativePositionBucketOptions {
        bidirectional: hostile.pick(&[true, false]),
        num_buckets: hostile.or(32, &INTEGERS),
        max_distance: hostile.or(128, &INTEGERS),
    };
    let y = relative_position_bucket(&positions, options);
    judge("relative_position_bucket", y, positions.shape(), Int32);
}

fn linear_attentions(hostile: &mut Hostile) {
    let [batch, rows, keys, heads, group] = [0; 5].map(|_| hostile.pick(&SIZES).min(7));
    let [size, value_size] = [0; 2].map(|_| hostile.pick(&SIZES));
    let dtype = hostile.pick(&FLOATING);
    let queries = hostile.array(&[batch, heads * group, rows, size], dtype);
    let k = hostile.array(&[batch, heads, keys, size], dtype);
    let v = hostile.array(&[batch, heads, keys, value_size], dtype);
    let (causal, layout) =
        (hostile.pick(&[true, false]), hostile.or(Layout::Bhsd, &[Layout::Bshd]));
    let (chunk_size, eps) = (hostile.or(5, &INTEGERS), hostile.or(1e-6, &NUMBERS));
    let shape = with_last(&queries, v.shape().last().copied().unwrap_or(0));
    let feature_map = hostile.pick(FeatureMap::ALL);
    let options =
        LinearAttentionOptions { feature_map, causal, eps, chunk_size, state: None, layout };
    let y = linear_attention_with_state(&queries, &k, &v, options);
    let (y, state) = y.map_or_else(|e| (Err(e), None), |(y, state)| (Ok(y), Some(state)));
    judge("linear_attention_with_state", y, &shape, queries.dtype());
    let state = state.as_ref().filter(|_| hostile.pick(&[true, false]));
    let y = linear_attention(&queries, &k, &v, LinearAttentionOptions { state, ..options });
    judge("linear_attention", y, &shape, queries.dtype());
    let count = hostile.pick(&SIZES);
    let features = hostile.array(&[count, size], dtype);
    let scale = hostile.or(None, &NUMBERS.map(Some));
    let options =
        PerformerAttentionOptions { scale, causal, chunk_size, state, layout, features: &features };
    let y = performer_attention(&queries, &k, &v, options);
    judge("performer_attention", y, &shape, queries.dtype());
    let max_length = hostile.or(None, &INTEGERS.map(Some));
    let offset = hostile.or(0, &INTEGERS);
    let options =
        CosFormerAttentionOptions { causal, max_length, offset, eps, chunk_size, state, layout };
    let y = cosformer_attention(&queries, &k, &v, options);
    judge("cosformer_attention", y, &shape, queries.dtype());
}

fn sparse_attentions(hostile: &mut Hostile) {
    let [batch, rows, keys, heads, group] = [0; 5].map(|_| hostile.pick(&SIZES).min(7));
    let [size, value_size] = [0; 2].map(|_| hostile.pick(&SIZES));
    let dtype = hostile.pick(&FLOATING);
    let keys = hostile.pick(&[rows, keys]);
    let queries = hostile.array(&[batch, heads * group, rows, size], dtype);
    let k = hostile.array(&[batch, heads, keys, size], dtype);
    let v = hostile.array(&[batch, heads, keys, value_size], dtype);
    let (causal, layout) =
        (hostile.pick(&[true, false]), hostile.or(Layout::Bhsd, &[Layout::Bshd]));
    let shape = with_last(&queries, v.shape().last().copied().unwrap_or(0));
    let scale = hostile.or(None, &NUMBERS.map(Some));
    let block_size = hostile.or(2, &INTEGERS);
    let [window_blocks, global_blocks, random_blocks] = [0; 3].map(|_| hostile.or(1, &INTEGERS));
    let options = BigBirdAttentionOptions {
        block_size,
        window_blocks,
        global_blocks,
        random_blocks,
        seed: hostile.0.bits(),
        scale,
        causal,
        layout,
    };
    let y = bigbird_attention(&queries, &k, &v, options);
    judge("bigbird_attention", y, &shape, queries.dtype());
    if let Ok(blocks) = options.pattern().layout(block_size, rows, keys) {
        let options = BlockSparseAttentionOptions { blocks: &blocks, scale, causal, layout };
        let y = block_sparse_attention(&queries, &k, &v, options);
        judge("block_sparse_attention", y, &shape, queries.dtype());
    }
    let tokens = [hostile.or(0, &INTEGERS), hostile.pick(&SIZES)];
    let of_tokens = hostile.array(&[batch, heads * group, 2, size], dtype);
    let global = LongformerGlobal { queries: &of_tokens, keys: &k, values: &v };
    let options = LongformerAttentionOptions {
        window: hostile.or(3, &INTEGERS),
        global_tokens: hostile.pick(&[&tokens, &[]]),
        global: hostile.maybe(global),
        scale,
        layout,
    };
    let y = longformer_attention(&queries, &k, &v, options);
    judge("longformer_attention", y, &shape, queries.dtype());
}

fn attention_of_stretches(hostile: &mut Hostile) {
    let [batch, rows, keys, heads, group] = [0; 5].map(|_| hostile.pick(&SIZES).min(7));
    let [size, value_size] = [0; 2].map(|_| hostile.pick(&SIZES));
    let dtype = hostile.pick(&FLOATING);
    let queries = hostile.array(&[batch, heads * group, rows, size], dtype);
    let k = hostile.array(&[batch, heads, keys, size], dtype);
    let v = hostile.array(&[batch, heads, keys, value_size], dtype);
    let (scale, causal) = (hostile.or(None, &NUMBERS.map(Some)), hostile.pick(&[true, false]));
    let layout = hostile.or(Layout::Bhsd, &[Layout::Bshd]);
    let dispatch = hostile.dispatch();
    let shape = with_last(&queries, v.shape().last().copied().unwrap_or(0));
    let options = SlidingWindowOptions { scale, causal, layout, dispatch };
    let y = sliding_window_attention(&queries, &k, &v, hostile.or(2, &INTEGERS), options);
    judge("sliding_window_attention", y, &shape, queries.dtype());
    let chunk_size = hostile.or(2, &INTEGERS);
    let query_offset = hostile.or(None, &INTEGERS.map(Some));
    let options =
        ChunkedCrossAttentionOptions { chunk_size, scale, causal, query_offset, layout, dispatch };
    let y = chunked_cross_attention(&queries, &k, &v, options);
    judge("chunked_cross_attention", y, &shape, queries.dtype());
    let lse = hostile.array(&[batch, heads * group, rows], Float32);
    let y = merge_states(&[(queries.clone(), lse.clone()), (queries.clone(), lse)], layout);
    judge("merge_states", y.map(|(y, _)| y), queries.shape(), queries.dtype());
}

fn paged(hostile: &mut Hostile) {
    let [count, sequences, blocks, heads, group] = [0; 5].map(|_| hostile.pick(&SIZES).min(7));
    let [size, value_size] = [0; 2].map(|_| hostile.pick(&SIZES));
    let (block, width) = (hostile.pick(&[1, 3, 8, 16, 0]), hostile.pick(&[0, 1, 2, 5]));
    let dtype = hostile.pick(&FLOATING);
    let stored = [0; 2].map(|_| hostile.or(dtype, &[Int8, Uint8]));
    let queries = hostile.array(&[count, heads * group, size], dtype);
    let keys = hostile.array(&[blocks, block, heads, size], stored[0]);
    let values = hostile.array(&[blocks, block, heads, value_size], stored[1]);
    let tables = hostile.array(&[sequences, width], Int32);
    let lengths = hostile.array(&[sequences], Int32);
    let starts = hostile.array(&[sequences + 1], Int32);
    let by_head = hostile.array(&[heads * group], dtype);
    let (by_token, by_block) = (
        hostile.array(&[blocks, block, heads], Float32),
        hostile.array(&[blocks, 1, heads], Float32),
    );
    let scales = stored.map(|stored| {
        let scales = hostile.pick(&[&by_token, &by_block]);
        let needed = (stored != dtype).then_some(scales);
        hostile.or(needed, &[None, Some(scales)])
    });
    let [left, right] = [0; 2].map(|_| hostile.or(None, &INTEGERS.map(Some)));
    let options = PagedAttentionOptions {
        query_starts: hostile.or(Some(&starts), &[None]),
        scale: hostile.or(None, &NUMBERS.map(Some)),
        soft_cap: hostile.or(None, &NUMBERS.map(Some)),
        alibi_slopes: hostile.or(None, &[Some(&by_head)]),
        causal: hostile.pick(&[true, false]),
        window: Window { left, right },
        sinks: hostile.or(None, &[Some(&by_head)]),
        key_scales: scales[0],
        value_scales: scales[1],
        dispatch: hostile.dispatch(),
    };
    let shape = with_last(&queries, values.shape().last().copied().unwrap_or(0));
    let y = paged_attention(&queries, keys, values, tables, lengths, options);
    judge("paged_attention", y, &shape, queries.dtype());
}

fn quantized(hostile: &mut Hostile) {
    let (group, bits) = (hostile.pick(&[32, 64, 128]), hostile.pick(&[2, 3, 4, 5, 6, 8]));
    let (shape, dtype) = ([hostile.pick(&SIZES), 2 * group], hostile.pick(&FLOATING));
    let (matrix, ids) = (hostile.array(&shape, dtype), hostile.array(&[2, 3], Int64));
    let (said, width) = (hostile.or(group, &INTEGERS), hostile.or(bits, &INTEGERS));
    let Ok(weight) = QuantizedWeight::quantize(matrix, said, width) else { return };
    let [outputs, inputs] = weight.shape();
    let shape = [ids.shape(), &[inputs]].concat();
    judge("QuantizedWeight::rows", weight.rows(&ids), &shape, weight.scales().dtype());
    let (x, bias) = (hostile.array(&shape, dtype), hostile.array(&[outputs], dtype));
    let options = QuantizedLinearOptions { dispatch: hostile.dispatch() };
    let y = quantized_linear(&x, &weight, hostile.maybe(&bias), options);
    judge("quantized_linear", y, &with_last(&x, outputs), x.dtype());
}

fn samplers(hostile: &mut Hostile) {
    let (rank, dtype) = (hostile.pick(&[1, 2, 3]), hostile.pick(&FLOATING));
    let shape = hostile.shape(rank);
    let logits = hostile.array(&shape, dtype);
    let (k, p) = (hostile.pick(&INTEGERS), hostile.or(0.9, &NUMBERS));
    judge("top_k", top_k(&logits, k), logits.shape(), logits.dtype());
    judge("top_p", top_p(&logits, p), logits.shape(), logits.dtype());
    judge("min_p", min_p(&logits, p, k), logits.shape(), logits.dtype());
    let leading = logits.shape().split_last().map_or(&[][..], |(_, leading)| leading);
    let (tokens, key) = (hostile.array(leading, Int32), hostile.array(&[2], Uint32));
    let y = token_log_probabilities(&logits, tokens);
    judge("token_log_probabilities", y, leading, Float32);
    let temperature = hostile.or(1.0, &NUMBERS);
    let options = SamplingOptions { temperature, top_k: k.max(-1), top_p: p, min_p: 0.1 };
    judge("sample", sample(&logits, key, &options), leading, Uint32);
}

fn blocks(hostile: &mut Hostile) {
    let builder = AttentionBuilder::new(8, hostile.or(2, &INTEGERS))
        .head_dim(hostile.or(None, &INTEGERS.map(Some)))
        .num_kv_heads(hostile.or(None, &INTEGERS.map(Some)))
        .scale(hostile.or(None, &NUMBERS.map(Some)));
    // Weights of a wider one would not fit into memory.
    let wide = builder.head_dim.or(Some(4)) > Some(64) || builder.num_heads > 64;
    let (Ok(attention), false) = (builder.build(), wide) else { return };
    let mut block = DecoderBlock::new(8, attention, GatedFeedForward::new(8, 6).unwrap()).unwrap();
    let mut cache = SimpleKvCache::new();
    for _ in 0..3 {
        let [batch, tokens] = [0; 2].map(|_| hostile.pick(&SIZES).min(2));
        let (held, dtype) = (cache.len(), hostile.pick(&FLOATING));
        let x = hostile.array(&[batch, tokens, 8], dtype);
        let mask = hostile.array(&[tokens, held + tokens], Bool);
        let mask = hostile.maybe(&mask);
        let y = block.forward(AttentionInput { x: &x, mask, cache: Some(&mut cache) });
        let appended = if y.is_ok() { x.dim(1) } else { 0 };
        assert_eq!(cache.len(), held + appended, "{y:?}");
        // Dense projections promote to the dtype of their weights.
        y.map(|y| judge("DecoderBlock", Ok(y), x.shape(), Float32)).unwrap_or_default();
    }
}

fn attention_layers(hostile: &mut Hostile) {
    let heads = hostile.or(2, &INTEGERS);
    let kv_heads = hostile.or(None, &INTEGERS.map(Some));
    let (causal, count) = (hostile.pick(&[true, false]), hostile.or(3, &[0, -1, i32::MIN]));
    let (dtype, [batch, tokens]) = (hostile.pick(&FLOATING), [0; 2].map(|_| hostile.pick(&SIZES)));
    let x = hostile.array(&[batch, tokens, 8], dtype);
    let ask = |op: &str, y: Result<Array, mlx_rs::error::Exception>| match y {
        // Dense projections promote to the dtype of their weights.
        Ok(y) => judge(op, Ok(y), x.shape(), Float32),
        Err(error) => assert!(error.what().starts_with('['), "{op}: {error}"),
    };
    let mut cache = LinearAttentionCache::default();
    let builder = LinearAttentionBuilder::new(8, heads).causal(causal).num_kv_heads(kv_heads);
    if let Ok(mut layer) = builder.chunk_size(count).build() {
        ask("LinearAttention", layer.forward((&x, &mut cache)));
        ask("LinearAttention", layer.forward((&x, &mut cache)));
    }
    let builder = PerformerAttentionBuilder::new(8, heads).causal(causal).num_features(count);
    if let Ok(mut layer) = builder.build() {
        ask("PerformerAttention", layer.forward(&x));
        ask("PerformerAttention", layer.forward((&x, &mut cache)));
    }
    let builder = CosFormerAttentionBuilder::new(8, heads).causal(causal).max_length(count);
    if let Ok(mut layer) = builder.build() {
        ask("CosFormerAttention", layer.forward(&x));
        ask("CosFormerAttention", layer.forward((&x, &mut cache)));
    }
    let pattern = BlockPattern { causal, global_blocks: count, ..Default::default() };
    let builder = BlockSparseAttentionBuilder::new(8, heads).pattern(pattern);
    if let Ok(mut layer) = builder.block_size(2).build() {
        ask("BlockSparseAttention", layer.forward(&x));
    }
    let builder = LongformerAttentionBuilder::new(8, heads).window(count).num_kv_heads(kv_heads);
    if let Ok(mut layer) = builder.num_global_tokens(hostile.or(1, &INTEGERS)).build() {
        ask("LongformerAttention", layer.forward(&x));
        let tokens = [hostile.pick(&INTEGERS)];
        ask("LongformerAttention", layer.forward((&x, &tokens[..])));
    }
}

fn ask_all(asks: &[fn(&mut Hostile)]) {
    for ask in asks {
        for seed in 0..250 {
            println!("seed {seed}");
            ask(&mut Hostile(Random::new(seed)));
        }
    }
}

#[test]
fn what_is_asked_of_norms_and_rotations_is_answered_or_refused() {
    host::install();
    ask_all(&[norms_and_activations, norms_in_company, ropes]);
}

#[test]
fn what_is_asked_of_attention_is_answered_or_refused() {
    host::install();
    ask_all(&[attention, paged, blocks]);
}

#[test]
fn what_is_asked_of_scans_is_answered_or_refused() {
    host::install();
    ask_all(&[scans]);
}

#[test]
fn what_is_asked_of_weights_and_draws_is_answered_or_refused() {
    host::install();
    ask_all(&[quantized, samplers, chains]);
}

#[test]
fn what_is_asked_of_caches_is_answered_or_refused() {
    ask_all(&[caches::caches]);
}

#[test]
fn what_is_asked_of_compositions_is_answered_or_refused() {
    ask_all(&[attention_biases, linear_attentions, sparse_attentions, attention_layers]);
    ask_all(&[attention_of_stretches, scans_of_states, selective_scans, state_space_layers]);
}

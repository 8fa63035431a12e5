//! Multi-head attention with its projections.

use mlx_rs::{Array, error::Exception, macros::ModuleParameters, module::Module};

use super::{Projection, WatchedProjection, prepared::Prepared};
use crate::{
    attention::{FlashAttentionOptions, KvCache, flash_attention},
    builder::builder,
    check::{Check, axes},
    error::Result,
    layout::Layout,
    norm::RmsNorm,
    rope::{QkNormRopeOptions, Rope, RopeOffset, qk_norm_rope},
};

const CHECK: Check = Check::op("Attention");

builder! {
    /// Builder for [`Attention`].
    AttentionBuilder => Attention (
        /// The size of the last axis of input and output.
        dims: i32,
        /// Query heads, `H`.
        num_heads: i32,
    ) {
        /// Key and value heads, `H_kv`, which must divide `H`; as many as query heads by default.
        num_kv_heads: Option<i32> = None,
        /// The size of a head, `D`; `dims / num_heads` by default.
        head_dim: Option<i32> = None,
        /// Rotates queries and keys; none by default.
        rope: Option<Rope> = None,
        /// Normalizes each head of queries and keys, over `D`, before they rotate, each with a copy of this weight to
        /// train; none by default.
        qk_norm: Option<RmsNorm> = None,
        /// Multiplies the scores; `1 / sqrt(D)` by default.
        scale: Option<f32> = None,
        /// Whether a token sees only itself and those before it; `true` by default.
        causal: bool = true,
        /// Whether the query, key and value projections have biases; `false` by default.
        bias: bool = false,
        /// Whether the output projection has a bias; `false` by default.
        output_bias: bool = false,
    }
}

/// Projects to queries, keys and values, normalizes the heads of the first two if asked to, rotates them, attends,
/// projects back.
///
/// Multi-head, grouped-query or multi-query, by the number of key and value heads.
///
/// # Shapes
/// `[B, S, dims]` to `[B, S, dims]`.
///
/// # Example
/// ```
/// use mlx_primitives::{layers::{Attention, AttentionBuilder}, rope::Rope};
/// use mlx_rs::{Array, builder::Builder, module::Module};
///
/// let mut attention = AttentionBuilder::new(64, 4).num_kv_heads(2).rope(Rope::new(16)?).build()?;
/// assert_eq!(attention.forward(&Array::ones::<f32>(&[1, 10, 64])?)?.shape(), [1, 10, 64]);
/// # Ok::<(), mlx_rs::error::Exception>(())
/// ```
#[derive(Debug, Clone, ModuleParameters)]
pub struct Attention {
    /// `[H · D, dims]`.
    #[param]
    pub query: WatchedProjection,
    /// `[H_kv · D, dims]`.
    #[param]
    pub key: WatchedProjection,
    /// `[H_kv · D, dims]`.
    #[param]
    pub value: WatchedProjection,
    /// `[dims, H · D]`.
    #[param]
    pub output: WatchedProjection,
    /// Over `D`, of each query head.
    #[param]
    pub query_norm: Option<RmsNorm>,
    /// Over `D`, of each key head.
    #[param]
    pub key_norm: Option<RmsNorm>,
    inward: Option<Prepared<3>>,
    outward: Option<Prepared<1>>,
    rope: Option<Rope>,
    dims: i32,
    num_heads: i32,
    num_kv_heads: i32,
    scale: Option<f32>,
    causal: bool,
}

/// Input of [`Attention`] and [`DecoderBlock`](super::DecoderBlock): `x`, and what may come with it.
#[derive(Debug)]
pub struct AttentionInput<'a> {
    /// `[B, S, dims]`.
    pub x: &'a Array,
    /// Boolean or additive, broadcastable to `[B, H, S, S_kv]`; on top of `causal`.
    pub mask: Option<&'a Array>,
    /// Keys and values of earlier tokens; this call appends its own, which come after them.
    pub cache: Option<&'a mut dyn KvCache>,
}

impl<'a> From<&'a Array> for AttentionInput<'a> {
    fn from(x: &'a Array) -> Self {
        Self { x, mask: None, cache: None }
    }
}

impl<'a> From<(&'a Array, &'a Array)> for AttentionInput<'a> {
    fn from((x, mask): (&'a Array, &'a Array)) -> Self {
        Self { x, mask: Some(mask), cache: None }
    }
}

impl<'a, C: KvCache> From<(&'a Array, &'a mut C)> for AttentionInput<'a> {
    fn from((x, cache): (&'a Array, &'a mut C)) -> Self {
        Self { x, mask: None, cache: Some(cache) }
    }
}

impl Attention {
    /// Causal multi-head attention without rotation or biases.
    ///
    /// # Errors
    /// When a size is below one, `num_heads` does not divide `dims`, or the sizes are too large.
    pub fn new(dims: i32, num_heads: i32) -> Result<Self> {
        Self::assemble(AttentionBuilder::new(dims, num_heads))
    }

    fn assemble(builder: AttentionBuilder) -> Result<Self> {
        let AttentionBuilder { dims, num_heads, bias, .. } = builder;
        let head_dim = checked_head_dim(&builder)?;
        let num_kv_heads = checked_kv_heads(&builder)?;
        let inner = checked_inner(num_heads, head_dim)?;
        let kv_inner = num_kv_heads * head_dim;
        check_scores(&builder, head_dim)?;
        if let Some(norm) = &builder.qk_norm {
            CHECK.shape("qk_norm", &norm.weight, axes![head_dim])?;
        }
        Ok(Self {
            query: Projection::random(dims, inner, bias)?.into(),
            key: Projection::random(dims, kv_inner, bias)?.into(),
            value: Projection::random(dims, kv_inner, bias)?.into(),
            output: Projection::random(inner, dims, builder.output_bias)?.into(),
            query_norm: builder.qk_norm.clone(),
            key_norm: builder.qk_norm,
            inward: None,
            outward: None,
            rope: builder.rope,
            dims,
            num_heads,
            num_kv_heads,
            scale: builder.scale,
            causal: builder.causal,
        })
    }

    /// Prepares the projections for inference on a GPU, where a token takes as long as the host needs to hand its operations
    /// over: up to 128 rows are multiplied by those to queries, keys and values as by one matrix, and weights are transposed once.
    ///
    /// The names and values of parameters stay as they are, and they take no more memory. A projection that is borrowed for
    /// writing afterwards, as [`parameters_mut`](mlx_rs::module::ModuleParameters::parameters_mut) does, is as it would be
    /// unprepared from the next call on. So is what cannot be one matrix, because it differs in kind, dtype, packing or the size
    /// of heads, and what is quantized and keeps an unpacked copy, as on a CPU.
    ///
    /// # Errors
    /// When MLX fails.
    ///
    /// # Example
    /// ```
    /// use mlx_primitives::layers::Attention;
    /// use mlx_rs::{Array, module::Module};
    ///
    /// let mut attention = Attention::new(64, 4)?;
    /// let x = Array::ones::<f32>(&[1, 10, 64])?;
    /// let before = attention.forward(&x)?;
    /// attention.prepare_for_inference()?;
    /// assert!(attention.forward(&x)?.all_close(before, 1e-5, 1e-5, None)?);
    /// # Ok::<(), mlx_rs::error::Exception>(())
    /// ```
    pub fn prepare_for_inference(&mut self) -> Result<()> {
        self.outward = Prepared::of([&mut self.output])?;
        self.inward = match self.heads_are_alike() {
            true => Prepared::of([&mut self.query, &mut self.key, &mut self.value])?,
            false => None,
        };
        Ok(())
    }

    /// Whether queries, keys and values have as many elements as their heads, all of one size.
    fn heads_are_alike(&self) -> bool {
        let size = |projection: &WatchedProjection, heads| {
            projection
                .outputs()
                .filter(|outputs| outputs % heads == 0)
                .map(|outputs| outputs / heads)
        };
        let of_queries = size(&self.query, self.num_heads);
        let [of_keys, of_values] =
            [&self.key, &self.value].map(|projection| size(projection, self.num_kv_heads));
        of_queries.is_some() && of_queries == of_keys && of_keys == of_values
    }

    /// How the tokens of `x` stand, which must be `[B, S, dims]`.
    pub(super) fn order(&self, x: &Array) -> Result<Order> {
        CHECK.floating("x", x)?;
        CHECK.shape("x", x, axes!["B", "S", self.dims])?;
        Ok(Order::of(x))
    }

    /// What comes out, `[B · S, dims]`, for `rows`, `[B · S, dims]`, of tokens that stand in `order`.
    pub(super) fn attend(
        &mut self,
        rows: &Array,
        order: Order,
        mask: Option<&Array>,
        cache: Option<&mut dyn KvCache>,
    ) -> Result<Array> {
        let options = self.options(mask, order.layout);
        let heads = self.project(rows, order)?;
        let attended = match cache {
            Some(cache) => self.attend_in(cache, heads, options)?,
            None => {
                let [queries, keys, values] = self.turned(heads, order.layout, 0.into())?;
                flash_attention(queries, keys, values, options)?
            }
        };
        Prepared::forward(&mut self.outward, &mut self.output, &order.merge(attended)?)
    }

    fn attend_in(
        &mut self,
        cache: &mut dyn KvCache,
        heads: Heads,
        options: FlashAttentionOptions,
    ) -> Result<Array> {
        let layout = options.layout;
        if let Some(rope) = self.rope_alone().filter(|_| cache.applies_rope()) {
            let [queries, keys, values] = self.apart(heads, layout)?;
            let rope = rope.options_for(layout, &queries, cache.offset())?;
            return cache.attend_with_rope(&queries, &keys, &values, rope, options);
        }
        let [queries, keys, values] = self.turned(heads, layout, cache.offset())?;
        cache.attend(&queries, &keys, &values, options)
    }

    /// How queries and keys are rotated, if nothing else is done to them.
    fn rope_alone(&self) -> Option<&Rope> {
        self.rope.as_ref().filter(|_| self.query_norm.is_none() && self.key_norm.is_none())
    }

    /// Queries, keys and values in the layout of `order`.
    fn project(&mut self, rows: &Array, order: Order) -> Result<Heads> {
        let parts = [&self.query, &self.key, &self.value];
        if let Some(whole) = Prepared::product(&mut self.inward, parts, rows)? {
            return Ok(Heads::Together(
                order.split(whole, self.num_heads + 2 * self.num_kv_heads)?,
            ));
        }
        let queries = order.split(self.query.forward(rows)?, self.num_heads)?;
        let keys = order.split(self.key.forward(rows)?, self.num_kv_heads)?;
        let values = order.split(self.value.forward(rows)?, self.num_kv_heads)?;
        Ok(Heads::Apart([queries, keys, values]))
    }

    fn apart(&self, heads: Heads, layout: Layout) -> Result<[Array; 3]> {
        let heads = match heads {
            Heads::Apart(heads) => return Ok(heads),
            Heads::Together(heads) => heads,
        };
        let places = [self.num_heads, self.num_heads + self.num_kv_heads];
        let parts = heads.split_at_indices(&places, layout.head_axis())?;
        Ok([parts[0].clone(), parts[1].clone(), parts[2].clone()])
    }

    /// Queries, keys and values of tokens that start at `offset`, normalized and rotated. What only turns, and stands together,
    /// turns at once.
    fn turned(&mut self, heads: Heads, layout: Layout, offset: RopeOffset) -> Result<[Array; 3]> {
        if let (Heads::Together(heads), Some(rope)) = (&heads, self.rope_alone()) {
            let [keys, values] = [self.num_heads, self.num_heads + self.num_kv_heads];
            let cut = |heads: &Array, place| heads.split_at_indices(&[place], layout.head_axis());
            let parts = cut(heads, values)?;
            let turned = cut(&rope.rotate_one(layout, &parts[0], offset)?, keys)?;
            return Ok([turned[0].clone(), turned[1].clone(), parts[1].clone()]);
        }
        let [queries, keys, values] = self.apart(heads, layout)?;
        let (queries, keys) = self.turn(queries, keys, layout, offset)?;
        Ok([queries, keys, values])
    }

    /// Normalizes and rotates what tokens that start at `offset` are compared by.
    fn turn(
        &mut self,
        queries: Array,
        keys: Array,
        layout: Layout,
        offset: RopeOffset,
    ) -> Result<(Array, Array)> {
        match (&mut self.query_norm, &mut self.key_norm, &self.rope) {
            (Some(query_norm), Some(key_norm), Some(rope)) if are_alike(query_norm, key_norm) => {
                let RmsNorm { eps, unit_offset, .. } = *query_norm;
                let rope = rope.options_for(layout, &queries, offset)?;
                let options = QkNormRopeOptions { eps, unit_offset, rope };
                let queries = (&queries, &*query_norm.weight);
                qk_norm_rope(queries, (&keys, &*key_norm.weight), offset, options)
            }
            (query_norm, key_norm, rope) => {
                let (queries, keys) = (normed(query_norm, queries)?, normed(key_norm, keys)?);
                match rope {
                    Some(rope) => rope.rotate_in(layout, &queries, &keys, offset),
                    None => Ok((queries, keys)),
                }
            }
        }
    }

    fn options<'a>(&self, mask: Option<&'a Array>, layout: Layout) -> FlashAttentionOptions<'a> {
        let (scale, causal) = (self.scale, self.causal);
        FlashAttentionOptions { scale, causal, mask, layout, ..Default::default() }
    }
}

fn checked_head_dim(builder: &AttentionBuilder) -> Result<i32> {
    let AttentionBuilder { dims, num_heads, .. } = *builder;
    CHECK.at_least("dims", dims, 1)?;
    CHECK.at_least("num_heads", num_heads, 1)?;
    if let Some(head_dim) = builder.head_dim {
        CHECK.at_least("head_dim", head_dim, 1)?;
        return Ok(head_dim);
    }
    CHECK.value(dims % num_heads == 0, "num_heads", format_args!("divide {dims}"), num_heads)?;
    Ok(dims / num_heads)
}

fn checked_kv_heads(builder: &AttentionBuilder) -> Result<i32> {
    let num_heads = builder.num_heads;
    let kv_heads = builder.num_kv_heads.unwrap_or(num_heads);
    CHECK.at_least("num_kv_heads", kv_heads, 1)?;
    let divides = num_heads % kv_heads == 0;
    CHECK.value(divides, "num_kv_heads", format_args!("divide {num_heads}"), kv_heads)?;
    Ok(kv_heads)
}

/// `H · D`, which the axes of an array must be able to hold.
fn checked_inner(num_heads: i32, head_dim: i32) -> Result<i32> {
    let inner = num_heads.checked_mul(head_dim);
    CHECK.known(inner, "head_dim", format_args!("fit {num_heads} times into an axis"), head_dim)
}

fn check_scores(builder: &AttentionBuilder, head_dim: i32) -> Result<()> {
    CHECK.finite("scale", builder.scale.unwrap_or(1.0))?;
    let turned = builder.rope.as_ref().map_or(0, Rope::dims);
    let expected = format_args!("turn at most D = {head_dim} elements");
    CHECK.value(turned <= head_dim, "rope", expected, turned)
}

/// Whether one call can do both.
fn are_alike(query_norm: &RmsNorm, key_norm: &RmsNorm) -> bool {
    (query_norm.eps, query_norm.unit_offset) == (key_norm.eps, key_norm.unit_offset)
}

fn normed(norm: &mut Option<RmsNorm>, x: Array) -> Result<Array> {
    Ok(norm.as_mut().map_or(Ok(x.clone()), |norm| norm.forward(&x))?)
}

/// Heads of queries, of keys and of values.
enum Heads {
    /// In one array, in this order.
    Together(Array),
    Apart([Array; 3]),
}

/// How the heads of tokens stand in an array. One token of each sequence is of either layout, and goes without a
/// transposition by that of the ops it goes to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Order {
    layout: Layout,
    batch: i32,
    tokens: i32,
}

impl Order {
    fn of(x: &Array) -> Self {
        let (batch, tokens) = (x.dim(0), x.dim(1));
        let layout = if tokens == 1 { Layout::Bhsd } else { Layout::Bshd };
        Self { layout, batch, tokens }
    }

    /// From `[B · S, heads · D]`.
    fn split(self, rows: Array, heads: i32) -> Result<Array> {
        let Self { layout, batch, tokens } = self;
        let size = rows.dim(1) / heads;
        Ok(rows.reshape(&layout.shape([batch, tokens, heads, size]))?)
    }

    /// To `[B · S, heads · D]`.
    fn merge(self, heads: Array) -> Result<Array> {
        let [_, _, count, size] = self.layout.dims(&heads);
        Ok(heads.reshape(&[self.batch * self.tokens, count * size])?)
    }
}

impl<'a, I: Into<AttentionInput<'a>>> Module<I> for Attention {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, input: I) -> Result<Array, Exception> {
        let AttentionInput { x, mask, cache } = input.into();
        let order = self.order(x)?;
        self.attend(&x.flatten(0, 1)?, order, mask, cache)?.reshape(x.shape())
    }

    fn training_mode(&mut self, mode: bool) {
        for projection in [&mut self.query, &mut self.key, &mut self.value, &mut self.output] {
            projection.training_mode(mode);
        }
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::builder::Builder;

    use super::*;

    fn grouped() -> Result<Attention> {
        AttentionBuilder::new(64, 4).num_kv_heads(2).build()
    }

    #[test]
    fn projections_of_the_right_sizes_are_prepared() -> Result<()> {
        let mut attention = grouped()?;
        attention.prepare_for_inference()?;
        assert!(attention.inward.is_some() && attention.outward.is_some());
        attention.forward(&Array::ones::<f32>(&[1, 3, 64])?)?;
        assert!(attention.inward.is_some() && attention.outward.is_some(), "it serves calls");
        Ok(())
    }

    /// As one matrix they would have the right number of heads between them.
    #[test]
    fn queries_and_keys_the_wrong_way_round_are_refused_prepared_too() -> Result<()> {
        let x = Array::ones::<f32>(&[1, 3, 64])?;
        let mut attention = grouped()?;
        std::mem::swap(&mut attention.query, &mut attention.key);
        let refusal = attention.forward(&x).map_err(|error| error.to_string());
        attention.prepare_for_inference()?;
        assert!(attention.inward.is_none());
        assert!(refusal.is_err() && attention.forward(&x).is_err());
        Ok(())
    }

    #[test]
    fn values_of_heads_of_another_size_are_left_alone() -> Result<()> {
        let x = Array::ones::<f32>(&[1, 3, 64])?;
        let mut attention = grouped()?;
        attention.value = Projection::random(64, 2 * 8, false)?.into();
        attention.output = Projection::random(4 * 8, 64, false)?.into();
        let expected = attention.forward(&x)?;
        attention.prepare_for_inference()?;
        assert!(attention.inward.is_none() && attention.outward.is_some());
        assert!(attention.forward(&x)?.all_close(expected, 1e-5, 1e-5, None)?);
        Ok(())
    }
}

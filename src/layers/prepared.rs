//! Projections of one input, prepared for few rows.

use mlx_rs::{
    Array,
    error::Exception,
    module::{Module, ModuleParameters},
    transforms::eval,
};

use super::{
    Projection,
    projection::affine,
    watched::{Version, WatchedProjection},
};
use crate::{
    error::Result,
    quant::{QuantizedCompute, QuantizedLinear},
};

/// The most rows that several projections are multiplied by as one. For few rows the host's share of a product is most of it,
/// and one costs less than several; of many, each part of the result would have to be copied to lie side by side. On an H200
/// steps of 32 and 64 rows gain a tenth and more; steps of more rows were not measured.
const FEW_ROWS: usize = 128;

/// What does at once what `N` projections of one input do, whose parameters are rows of its own.
#[derive(Debug, Clone)]
pub(super) struct Prepared<const N: usize> {
    whole: Whole,
    /// Those of the parts when they were prepared.
    versions: [Version; N],
}

#[derive(Debug, Clone)]
enum Whole {
    /// The weight as it is multiplied by, `[I, O]`: a view made once.
    Dense {
        weight: Array,
        bias: Option<Array>,
    },
    Packed(Box<QuantizedLinear>),
}

impl<const N: usize> Prepared<N> {
    /// Prepares `parts`, which take no more memory then than before; none where nothing would be gained, or where they differ in
    /// more than how many outputs they have.
    pub(super) fn of(parts: [&mut WatchedProjection; N]) -> Result<Option<Self>> {
        let projections = parts.each_ref().map(|part| &***part);
        if !projections.iter().all(|part| gains(part, N)) {
            return Ok(None);
        }
        let Some(whole) = Projection::stacked(&projections)? else { return Ok(None) };
        let versions = parts.each_ref().map(|part| part.version());
        let mut start = 0;
        for part in parts {
            let end = start + part.outputs().unwrap_or_default();
            part.inner_mut().lie_in(&whole, start..end)?;
            start = end;
            // Now, so that nothing holds what it was made of any longer.
            eval(part.parameters().flatten().into_values())?;
        }
        Ok(Some(Self { whole: Whole::of(whole)?, versions }))
    }

    /// The products of `x`, `[.., I]`, with all `parts`, one after another along the last axis, if the parts are what was
    /// prepared and the rows are few. What is stale is let go.
    pub(super) fn product(
        prepared: &mut Option<Self>,
        parts: [&WatchedProjection; N],
        x: &Array,
    ) -> Result<Option<Array>> {
        let versions = parts.map(WatchedProjection::version);
        prepared.take_if(|prepared| prepared.versions != versions);
        let Some(prepared) = prepared else { return Ok(None) };
        let rows = x.size() / x.dim(-1).max(1).unsigned_abs() as usize;
        if N > 1 && rows > FEW_ROWS {
            return Ok(None);
        }
        Ok(Some(prepared.whole.product(x)?))
    }
}

impl Prepared<1> {
    /// The product of `x` with `part`, by what was prepared where that serves.
    pub(super) fn forward(
        prepared: &mut Option<Self>,
        part: &mut WatchedProjection,
        x: &Array,
    ) -> Result<Array> {
        match Self::product(prepared, [part], x)? {
            Some(product) => Ok(product),
            None => Ok(part.forward(x)?),
        }
    }
}

/// Whether one of `count` parts is worth preparing: one that keeps an unpacked copy would keep another, and a packed one has
/// nothing to transpose.
fn gains(part: &Projection, count: usize) -> bool {
    match part {
        Projection::Dense(_) => true,
        Projection::Quantized(linear) => count > 1 && linear.compute() == QuantizedCompute::Packed,
    }
}

impl Whole {
    fn of(projection: Projection) -> Result<Self> {
        match projection {
            Projection::Dense(linear) => {
                let weight = linear.weight.t();
                weight.eval()?;
                Ok(Self::Dense { weight, bias: linear.bias.value })
            }
            Projection::Quantized(linear) => Ok(Self::Packed(linear.into())),
        }
    }

    fn product(&mut self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense { weight, bias } => affine(x, weight, bias.as_ref()),
            Self::Packed(linear) => linear.forward(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mlx_rs::{Dtype, builder::Builder, nn, ops::concatenate, random::normal};

    use super::*;
    use crate::quant::{QuantizedLinearBuilder, QuantizedWeight};

    fn dense(outputs: i32, bias: bool) -> Result<WatchedProjection> {
        Ok(Projection::random(64, outputs, bias)?.into())
    }

    fn quantized(outputs: i32, bits: i32, compute: QuantizedCompute) -> Result<WatchedProjection> {
        let matrix = normal::<f32>(&[outputs, 64], None, None, None)?;
        let weight = QuantizedWeight::quantize(&matrix, 32, bits)?;
        Ok(QuantizedLinearBuilder::new(weight).compute(compute).build()?.into())
    }

    fn packed(outputs: i32, bits: i32) -> Result<WatchedProjection> {
        quantized(outputs, bits, QuantizedCompute::Packed)
    }

    fn rows(count: i32) -> Result<Array> {
        Ok(normal::<f32>(&[count, 64], None, None, None)?)
    }

    /// Whether two are multiplied as one, and rightly, by so many rows.
    fn is_one([one, other]: &mut [WatchedProjection; 2], count: i32) -> Result<bool> {
        let x = rows(count)?;
        let each = concatenate(&[one.forward(&x)?, other.forward(&x)?], 1)?;
        let mut prepared = Prepared::of([one, other])?;
        let product = Prepared::product(&mut prepared, [one, other], &x)?;
        if let Some(product) = &product {
            assert!(product.all_close(each, 1e-5, 1e-5, None)?);
        }
        Ok(product.is_some())
    }

    #[test]
    fn projections_of_a_kind_are_multiplied_as_one() -> Result<()> {
        assert!(is_one(&mut [dense(5, false)?, dense(3, false)?], 1)?);
        assert!(is_one(&mut [dense(5, true)?, dense(3, true)?], 7)?);
        assert!(is_one(&mut [packed(5, 4)?, packed(3, 4)?], 7)?);
        Ok(())
    }

    #[test]
    fn many_rows_are_multiplied_by_each_of_several() -> Result<()> {
        assert!(is_one(&mut [dense(5, false)?, dense(3, false)?], 128)?);
        assert!(!is_one(&mut [dense(5, false)?, dense(3, false)?], 129)?);
        let (mut lone, x) = (dense(5, true)?, rows(129)?);
        let mut prepared = Prepared::of([&mut lone])?;
        let Some(product) = Prepared::product(&mut prepared, [&lone], &x)? else {
            return Err(crate::Error::Mlx(Exception::custom("not prepared")));
        };
        assert!(product.all_close(lone.forward(&x)?, 1e-5, 1e-5, None)?);
        Ok(())
    }

    #[test]
    fn projections_of_different_kinds_stay_apart() -> Result<()> {
        let mut half = dense(3, false)?;
        for parameter in half.parameters_mut().flatten().into_values() {
            *parameter = parameter.as_dtype(Dtype::Float16)?;
        }
        for other in [half, dense(3, true)?, packed(3, 4)?] {
            assert!(!is_one(&mut [dense(5, false)?, other], 1)?);
        }
        assert!(!is_one(&mut [packed(5, 4)?, packed(3, 8)?], 1)?);
        Ok(())
    }

    #[test]
    fn what_would_gain_nothing_is_left_alone() -> Result<()> {
        let unpacked = || quantized(5, 4, QuantizedCompute::Dense);
        assert!(Prepared::of([&mut unpacked()?, &mut unpacked()?])?.is_none());
        assert!(Prepared::of([&mut packed(5, 4)?])?.is_none());
        assert!(Prepared::of([&mut dense(5, false)?])?.is_some());
        Ok(())
    }

    /// A bias of one number serves all outputs, and is no row of any.
    #[test]
    fn parameters_of_other_sizes_are_left_alone() -> Result<()> {
        let odd = || -> Result<WatchedProjection> {
            let mut linear = nn::LinearBuilder::new(64, 5).build()?;
            linear.bias.value = Some(normal::<f32>(&[1], None, None, None)?);
            Ok(linear.into())
        };
        assert!(Prepared::of([&mut odd()?, &mut odd()?])?.is_none());
        assert!(Prepared::of([&mut odd()?])?.is_none());
        Ok(())
    }

    #[test]
    fn whoever_may_write_to_one_parts_them() -> Result<()> {
        let writers: [fn(&mut WatchedProjection) -> Result<()>; 3] = [
            |part| {
                *part = dense(3, false)?;
                Ok(())
            },
            |part| {
                part.parameters_mut();
                Ok(())
            },
            |part| {
                if let Projection::Dense(linear) = &mut **part {
                    linear.weight.value = rows(3)?;
                }
                Ok(())
            },
        ];
        for write in writers {
            let (mut one, mut other) = (dense(5, false)?, dense(3, false)?);
            let mut prepared = Prepared::of([&mut one, &mut other])?;
            let (mut of_clone, clone, x) = (prepared.clone(), other.clone(), rows(1)?);
            write(&mut other)?;
            assert!(Prepared::product(&mut prepared, [&one, &other], &x)?.is_none());
            assert!(prepared.is_none(), "what is stale is let go");
            assert!(Prepared::product(&mut of_clone, [&one, &clone], &x)?.is_some());
        }
        Ok(())
    }

    #[test]
    fn to_compute_and_to_freeze_parts_nothing() -> Result<()> {
        let (mut one, mut other) = (dense(5, false)?, dense(3, false)?);
        let mut prepared = Prepared::of([&mut one, &mut other])?;
        one.forward(&rows(1)?)?;
        other.training_mode(false);
        one.freeze_parameters(true);
        other.unfreeze_parameters(true);
        assert!(Prepared::product(&mut prepared, [&one, &other], &rows(1)?)?.is_some());
        Ok(())
    }

    #[test]
    fn parts_keep_their_parameters() -> Result<()> {
        for mut parts in [
            [packed(5, 4)?, packed(3, 4)?],
            [dense(5, false)?, dense(3, false)?],
            [dense(5, true)?, dense(3, true)?],
        ] {
            let held = |part: &WatchedProjection| -> BTreeMap<_, _> {
                let flat = part.parameters().flatten().into_iter();
                flat.map(|(name, array)| (name, array.clone())).collect()
            };
            let before = parts.each_ref().map(held);
            assert!(is_one(&mut parts, 1)?);
            for (part, before) in parts.iter().zip(&before) {
                let after = held(part);
                assert!(after.keys().eq(before.keys()), "{after:?}");
                for (name, array) in &after {
                    assert!(array.eq_values(&before[name])?, "{name}");
                }
            }
        }
        Ok(())
    }
}

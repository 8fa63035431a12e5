//! Projections of one input, prepared for few rows.

use mlx_rs::{
    Array,
    error::Exception,
    module::{Module, ModuleParameters},
    ops,
    transforms::eval,
};

use super::{
    Projection,
    watched::{Version, Watched},
};
use crate::{error::Result, quant::QuantizedLinear};

/// The most rows that are multiplied by the whole. For few rows the host's share of a product is most of it, and one costs
/// less than several; of many, each part of the result would have to be copied to lie side by side.
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
    Quantized(Box<QuantizedLinear>),
}

impl<const N: usize> Prepared<N> {
    /// Prepares `parts`, which take no more memory then than before; none where they differ in more than how many outputs they
    /// have.
    pub(super) fn of(parts: [&mut Watched; N]) -> Result<Option<Self>> {
        let projections = parts.each_ref().map(|part| &***part);
        let Some(whole) = Projection::stacked(&projections)? else { return Ok(None) };
        let versions = parts.each_ref().map(|part| part.version());
        let mut start = 0;
        for part in parts {
            let end = start + part.outputs();
            part.unchanged().lie_in(&whole, start..end)?;
            start = end;
            // Now, so that nothing holds what it was made of any longer.
            eval(part.parameters().flatten().into_values())?;
        }
        Ok(Some(Self { whole: Whole::of(whole)?, versions }))
    }

    /// The products of `x`, `[.., I]`, with all `parts`, one after another along the last axis, if the parts are what was
    /// prepared and the rows are few.
    pub(super) fn product(
        prepared: &mut Option<Self>,
        parts: [&Watched; N],
        x: &Array,
    ) -> Result<Option<Array>> {
        let Some(prepared) = prepared else { return Ok(None) };
        let rows = x.size() / x.dim(-1).max(1).unsigned_abs() as usize;
        if rows > FEW_ROWS || parts.map(Watched::version) != prepared.versions {
            return Ok(None);
        }
        Ok(Some(prepared.whole.product(x)?))
    }
}

impl Prepared<1> {
    /// [`Watched::forward`], by what was prepared where that serves.
    pub(super) fn forward(
        prepared: &mut Option<Self>,
        part: &mut Watched,
        x: &Array,
    ) -> Result<Array> {
        match Self::product(prepared, [part], x)? {
            Some(product) => Ok(product),
            None => Ok(part.forward(x)?),
        }
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
            Projection::Quantized(linear) => Ok(Self::Quantized(linear.into())),
        }
    }

    fn product(&mut self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Dense { weight, bias: None } => ops::matmul(x, weight),
            Self::Dense { weight, bias: Some(bias) } => ops::addmm(bias, x, weight, None, None),
            Self::Quantized(linear) => linear.forward(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use mlx_rs::{Dtype, ops::concatenate, random::normal};

    use super::*;
    use crate::quant::QuantizedWeight;

    fn dense(outputs: i32, bias: bool) -> Result<Watched> {
        Ok(Projection::random(64, outputs, bias)?.into())
    }

    fn packed(outputs: i32, bits: i32) -> Result<Watched> {
        let matrix = normal::<f32>(&[outputs, 64], None, None, None)?;
        Ok(QuantizedLinear::from_weight(QuantizedWeight::quantize(&matrix, 32, bits)?)?.into())
    }

    fn rows(count: i32) -> Result<Array> {
        Ok(normal::<f32>(&[count, 64], None, None, None)?)
    }

    /// Whether two are multiplied as one, and rightly, by so many rows.
    fn is_one([one, other]: &mut [Watched; 2], count: i32) -> Result<bool> {
        let mut prepared = Prepared::of([one, other])?;
        let x = rows(count)?;
        let product = Prepared::product(&mut prepared, [one, other], &x)?;
        if let Some(product) = &product {
            let each = concatenate(&[one.forward(&x)?, other.forward(&x)?], 1)?;
            assert!(product.all_close(&each, 1e-5, 1e-5, None)?);
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
    fn many_rows_are_multiplied_by_each() -> Result<()> {
        assert!(is_one(&mut [dense(5, false)?, dense(3, false)?], 128)?);
        assert!(!is_one(&mut [dense(5, false)?, dense(3, false)?], 129)?);
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
    fn whoever_may_write_to_one_parts_them() -> Result<()> {
        let writers: [fn(&mut Watched) -> Result<()>; 3] = [
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
            let (mut a_clone, x) = (other.clone(), rows(1)?);
            write(&mut other)?;
            assert!(Prepared::product(&mut prepared, [&one, &other], &x)?.is_none());
            assert!(Prepared::product(&mut prepared, [&one, &a_clone], &x)?.is_some());
            write(&mut a_clone)?;
            assert!(Prepared::product(&mut prepared, [&one, &a_clone], &x)?.is_none());
        }
        Ok(())
    }

    #[test]
    fn parts_keep_their_parameters() -> Result<()> {
        let mut parts = [packed(5, 4)?, packed(3, 4)?];
        let held = |part: &Watched| -> BTreeMap<_, _> {
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
        Ok(())
    }
}

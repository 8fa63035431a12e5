//! The step sizes that blocks of Mamba start with.

use mlx_rs::{Array, ops::expm1, random::uniform};

use crate::{check::Check, error::Result};

/// As in the papers.
pub(super) const DEFAULT: (f32, f32) = (1e-3, 1e-1);

pub(super) fn check(check: Check, range: (f32, f32)) -> Result<(f32, f32)> {
    check.positive("dt_range.0", range.0)?;
    check.value(range.1 >= range.0 && range.1.is_finite(), "dt_range", "rise", range.1)?;
    Ok(range)
}

/// `[count]`: biases whose softplus spreads evenly over the logarithms of the range.
pub(super) fn bias(count: i32, (least, most): (f32, f32)) -> Result<Array> {
    let steps = uniform::<_, f32>(least.ln(), most.ln(), &[count], None)?.exp()?;
    // ln(exp(dt) − 1), which softplus undoes.
    Ok(expm1(steps.negative()?)?.negative()?.log()?.add(&steps)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_begin_within_their_range() -> Result<()> {
        for (least, most) in [DEFAULT, (1e-6, 1e-5), (0.5, 30.0)] {
            for bias in bias(500, (least, most))?.as_slice::<f32>() {
                let step = f64::from(*bias).exp().ln_1p();
                let within = f64::from(least) * 0.999..f64::from(most) * 1.001;
                assert!(within.contains(&step), "{step} of {least} to {most}");
            }
        }
        Ok(())
    }
}

//! Scans as loops over f64 numbers.

use mlx_primitives::scan::ScanOperator;

use crate::support::tensor::Tensor;

/// What is asked of a scan, but for the numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask<'a> {
    pub(crate) axis: usize,
    pub(crate) exclusive: bool,
    pub(crate) reverse: bool,
    pub(crate) segments: Option<&'a [i32]>,
}

impl Ask<'_> {
    pub(crate) const fn along(axis: usize) -> Self {
        Self { axis, exclusive: false, reverse: false, segments: None }
    }

    pub(crate) fn state_shape(&self, shape: &[usize]) -> Vec<usize> {
        let mut shape = shape.to_vec();
        match self.segments {
            Some(segments) => shape[self.axis] = segments.len() - 1,
            None => drop(shape.remove(self.axis)),
        }
        shape
    }
}

pub(crate) fn nothing(operator: ScanOperator) -> f64 {
    match operator {
        ScanOperator::Add => 0.0,
        ScanOperator::Mul => 1.0,
        ScanOperator::Min => f64::INFINITY,
        _ => f64::NEG_INFINITY,
    }
}

fn operate(operator: ScanOperator, a: f64, b: f64) -> f64 {
    match operator {
        ScanOperator::Add => a + b,
        ScanOperator::Mul => a * b,
        ScanOperator::Max => a.max(b),
        ScanOperator::Min => a.min(b),
        _ if a.max(b) == f64::NEG_INFINITY => f64::NEG_INFINITY,
        _ => a.max(b) + (a.min(b) - a.max(b)).exp().ln_1p(),
    }
}

pub(crate) fn associative(
    operator: ScanOperator,
    x: &Tensor,
    state: Option<&Tensor>,
    ask: Ask,
) -> [Tensor; 2] {
    scan(x, state, nothing(operator), ask, |h, at| operate(operator, h, x.values[at]))
}

/// `a` has the rank of `x`, and one element or as many along each axis.
pub(crate) fn affine(a: &Tensor, x: &Tensor, state: Option<&Tensor>, ask: Ask) -> [Tensor; 2] {
    let a = Tensor::from_fn(&x.shape, |index| {
        let own = index.iter().zip(&a.shape).map(|(&i, &size)| if size == 1 { 0 } else { i });
        a.at(&own.collect::<Vec<_>>())
    });
    scan(x, state, 0.0, ask, |h, at| a.values[at] * h + x.values[at])
}

fn scan(
    x: &Tensor,
    state: Option<&Tensor>,
    nothing: f64,
    ask: Ask,
    step: impl Fn(f64, usize) -> f64,
) -> [Tensor; 2] {
    let length = x.shape[ask.axis];
    let outer = x.shape[..ask.axis].iter().product::<usize>();
    let inner = x.shape[ask.axis + 1..].iter().product::<usize>();
    let whole = [0, length as i32];
    let bounds = ask.segments.unwrap_or(&whole);
    let mut y = vec![f64::NAN; x.values.len()];
    let mut last = Vec::new();
    for o in 0..outer {
        for segment in bounds.windows(2) {
            for i in 0..inner {
                let mut h = state.map_or(nothing, |state| state.values[last.len()]);
                for n in segment[0]..segment[1] {
                    let t = if ask.reverse { segment[1] - 1 - (n - segment[0]) } else { n };
                    let at = (o * length + t as usize) * inner + i;
                    let before = h;
                    h = step(h, at);
                    y[at] = if ask.exclusive { before } else { h };
                }
                last.push(h);
            }
        }
    }
    [Tensor::new(&x.shape, y), Tensor::new(&ask.state_shape(&x.shape), last)]
}

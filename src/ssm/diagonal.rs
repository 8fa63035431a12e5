//! A linear time-invariant state-space model with a diagonal state matrix: a convolution that is also a recurrence.

use std::f32::consts::FRAC_1_SQRT_2;

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    fft::{irfft, rfft},
    linalg::eigvalsh,
    macros::ModuleParameters,
    module::Param,
    ops::{
        arange, broadcast_to, expm1,
        indexing::{Ellipsis, TryIndexOp},
        matmul, ones, pad,
    },
    random::{normal, uniform},
};

use crate::{
    check::{Check, axes},
    dispatch::aside,
    error::Result,
    sizes::div_ceil,
    uploads,
};

/// `h_t = exp(Δ a) h_{t−1} + (exp(Δ a) − 1) / a · u_t` and `y_t = 2 Re Σ c · h_t + d · u_t`, for each channel with its own `Δ`,
/// and complex `a`, `c` and `h`, each of which stands for itself and its conjugate.
///
/// That is the system `h′ = a h + u` held constant over steps of length `Δ`. The real part of `a` is below zero whatever is
/// learned, so that no state grows. The imaginary parts start as those of HiPPO-LegS, which makes a state remember all of
/// the past by Legendre polynomials.
///
/// Gu, Gupta, Goel and Ré, [On the Parameterization and Initialization of Diagonal State Space
/// Models](https://arxiv.org/abs/2206.11893), 2022.
#[derive(Debug, Clone, ModuleParameters)]
#[allow(non_snake_case, reason = "parameters are named as in the paper's own code")]
pub struct DiagonalSsm {
    /// `[H]`: the logarithm of `Δ`.
    #[param]
    pub log_dt: Param<Array>,
    /// `[H, N / 2]`: the logarithm of minus the real part of `a`.
    #[param]
    pub log_A_real: Param<Array>,
    /// `[H, N / 2]`: the imaginary part of `a`.
    #[param]
    pub A_imag: Param<Array>,
    /// `[H, N / 2, 2]`: the real and imaginary parts of `c`.
    #[param]
    pub C: Param<Array>,
    /// `[H]`.
    #[param]
    pub D: Param<Array>,
}

/// The states of a [`DiagonalSsm`].
#[derive(Debug, Clone)]
pub struct DiagonalState {
    /// The real parts, `[B, H, M, N / 2]`, f32, of `M` sequences a channel.
    pub real: Array,
    /// The imaginary parts, of the same shape.
    pub imaginary: Array,
}

/// A complex array by parts.
#[derive(Debug, Clone)]
struct Complex {
    real: Array,
    imaginary: Array,
}

impl Complex {
    fn times(&self, other: &Self) -> Result<Self, Exception> {
        let real = self.real.multiply(&other.real)?;
        let imaginary = self.real.multiply(&other.imaginary)?;
        Ok(Self {
            real: real.subtract(self.imaginary.multiply(&other.imaginary)?)?,
            imaginary: imaginary.add(self.imaginary.multiply(&other.real)?)?,
        })
    }

    fn plus(&self, other: &Self) -> Result<Self, Exception> {
        let real = self.real.add(&other.real)?;
        Ok(Self { real, imaginary: self.imaginary.add(&other.imaginary)? })
    }

    fn map(&self, each: impl Fn(&Array) -> Result<Array, Exception>) -> Result<Self, Exception> {
        Ok(Self { real: each(&self.real)?, imaginary: each(&self.imaginary)? })
    }
}

impl DiagonalSsm {
    /// The steps to start with, smallest and largest.
    pub const DEFAULT_DT_RANGE: (f32, f32) = (1e-3, 1e-1);

    /// `channels` systems of `states` states each, random but for `a`.
    pub(super) fn new(
        check: Check,
        channels: i32,
        states: i32,
        (least, most): (f32, f32),
    ) -> Result<Self> {
        let even = states >= 2 && states % 2 == 0 && states <= 1024;
        check.value(even, "d_state", "be even, from 2 to 1024", states)?;
        check.positive("dt_range.0", least)?;
        check.value(most >= least && most.is_finite(), "dt_range", "rise", most)?;
        let pairs = states / 2;
        let log_dt = uniform::<_, f32>(least.ln(), most.ln(), &[channels], None)?;
        let real = uploads::float(0.5_f32.ln());
        let frequencies = broadcast_to(frequencies(states)?, &[channels, pairs])?.contiguous()?;
        let c = normal::<f32>(&[channels, pairs, 2], None, FRAC_1_SQRT_2, None)?;
        Ok(Self {
            log_dt: Param::new(log_dt),
            log_A_real: Param::new(broadcast_to(real, &[channels, pairs])?.contiguous()?),
            A_imag: Param::new(frequencies),
            C: Param::new(c),
            D: Param::new(ones::<f32>(&[channels])?),
        })
    }

    /// `u`, `[B, L, H, M]`, f32, from these states on; returns `y`, of the same shape, and the states after it.
    ///
    /// By a convolution, in `O(L log L)`.
    pub(super) fn convolve(
        &self,
        u: &Array,
        state: Option<&DiagonalState>,
    ) -> Result<(Array, DiagonalState)> {
        let exponent = self.exponent()?;
        let weight = self.weight(&exponent)?.map(|part| part.expand_dims(-2))?;
        let grid = Grid::new(&exponent, u.dim(1));
        // As in a matrix product: sequences to the front, time last.
        let by_sequence = u.transpose_axes(&[0, 2, 3, 1])?;
        let mut seen = causal_product(&by_sequence, &grid.read(&weight, 0)?)?;
        let mut end = grid.gather(&by_sequence)?;
        if let Some(state) = state {
            let held = Complex { real: state.real.clone(), imaginary: state.imaginary.clone() };
            seen = seen.add(grid.read(&held.times(&weight)?, 1)?)?;
            let fading = powers(&exponent, &uploads::float(u.dim(1) as f32))?;
            end = end.plus(&held.times(&fading.map(|part| part.expand_dims(-2))?)?)?;
        }
        let seen = seen.transpose_axes(&[0, 3, 1, 2])?;
        let y = u.multiply(self.D.expand_dims(-1)?)?.add(seen)?;
        Ok((y, DiagonalState { real: end.real, imaginary: end.imaginary }))
    }

    /// `u`, `[B, H, M]`, f32: one step of the recurrence.
    pub(super) fn step(
        &self,
        u: &Array,
        state: Option<&DiagonalState>,
    ) -> Result<(Array, DiagonalState)> {
        let exponent = self.exponent()?;
        let row = |part: &Array| part.expand_dims(-2);
        let weight = self.weight(&exponent)?.map(row)?;
        let entering = u.expand_dims(-1)?;
        let next = match state {
            None => {
                let shape = [u.shape(), &[self.A_imag.dim(1)]].concat();
                let real = broadcast_to(&entering, &shape)?;
                Complex { imaginary: real.multiply(uploads::float(0.0))?, real }
            }
            Some(state) => {
                let held = Complex { real: state.real.clone(), imaginary: state.imaginary.clone() };
                let kept = held.times(&powers(&exponent, &uploads::float(1.0))?.map(row)?)?;
                Complex { real: kept.real.add(&entering)?, ..kept }
            }
        };
        let y = next.times(&weight)?.real.sum_axis(-1, false)?.multiply(uploads::float(2.0))?;
        let y = y.add(u.multiply(self.D.expand_dims(-1)?)?)?;
        Ok((y, DiagonalState { real: next.real, imaginary: next.imaginary }))
    }

    /// Whether the states are those of so many rows of `copies` sequences a channel.
    pub(super) fn check_state(
        &self,
        check: Check,
        state: &DiagonalState,
        batch: i32,
        copies: i32,
    ) -> Result<()> {
        let pairs = self.A_imag.dim(1);
        for (name, part) in [("state.real", &state.real), ("state.imaginary", &state.imaginary)] {
            check.dtype_among(name, part, &[Dtype::Float32])?;
            check.shape(name, part, axes![batch, self.D.dim(0), copies, pairs])?;
        }
        Ok(())
    }

    /// `Δ a`, `[H, N / 2]`.
    fn exponent(&self) -> Result<Complex> {
        let dt = self.log_dt.exp()?.expand_dims(-1)?;
        let real = self.log_A_real.exp()?.negative()?.multiply(&dt)?;
        Ok(Complex { real, imaginary: self.A_imag.multiply(dt)? })
    }

    /// `c (exp(Δ a) − 1) / a`, by which a state is read that takes in `u` itself.
    fn weight(&self, exponent: &Complex) -> Result<Complex> {
        let dt = self.log_dt.exp()?.expand_dims(-1)?;
        // Neither part of exp(Δ a) − 1 as a difference of numbers next to each other.
        let decay = exponent.real.exp()?;
        let half = exponent.imaginary.multiply(uploads::float(0.5))?.sin()?.square()?;
        let turned = decay.multiply(half)?.multiply(uploads::float(2.0))?;
        let grown = Complex {
            real: expm1(&exponent.real)?.subtract(turned)?,
            imaginary: decay.multiply(exponent.imaginary.sin()?)?,
        };
        let size = exponent.real.square()?.add(exponent.imaginary.square()?)?;
        // (Δ a)⁻¹ is its conjugate over its size.
        let conjugate = exponent.map(|part| part.multiply(&dt)?.divide(&size))?;
        let inverse = Complex { imaginary: conjugate.imaginary.negative()?, ..conjugate };
        let c = Complex {
            real: self.C.try_index((Ellipsis, 0))?,
            imaginary: self.C.try_index((Ellipsis, 1))?,
        };
        Ok(c.times(&grown)?.times(&inverse)?)
    }
}

/// `exp(exponent · steps)`: of `[H, N / 2]` and `[L]` `[H, N / 2, L]`, of a scalar `[H, N / 2]`.
fn powers(exponent: &Complex, steps: &Array) -> Result<Complex> {
    let spread = |part: &Array| match steps.ndim() {
        0 => part.multiply(steps),
        _ => part.expand_dims(-1)?.multiply(steps),
    };
    let exponents = exponent.map(spread)?;
    let decay = exponents.real.exp()?;
    Ok(Complex {
        real: decay.multiply(exponents.imaginary.cos()?)?,
        imaginary: decay.multiply(exponents.imaginary.sin()?)?,
    })
}

/// The steps of a sequence in rows of about as many as there are rows.
///
/// The power of a step is that of its row times that of its place in the row: powers of `2 √L` steps in place of `L`, and
/// matrix products over them.
struct Grid<'a> {
    exponent: &'a Complex,
    length: i32,
    rows: i32,
    columns: i32,
}

impl<'a> Grid<'a> {
    fn new(exponent: &'a Complex, length: i32) -> Self {
        let some = length.max(1);
        let columns = (some as f32).sqrt().ceil() as i32;
        Self { exponent, length, rows: div_ceil(some, columns), columns }
    }

    /// `2 Re Σ weights · exp(exponent · t)` for each of `L` steps from `first` on: of `[..., H, M, N / 2]` `[..., H, M, L]`.
    fn read(&self, weights: &Complex, first: i32) -> Result<Array> {
        let starts = arange::<_, f32>(None, self.rows, None)?;
        let starts = starts.multiply(uploads::float(self.columns as f32))?;
        let starts = starts.add(uploads::float(first as f32))?;
        // [H, 1, rows, N / 2] and [H, 1, N / 2, columns].
        let of_rows =
            powers(self.exponent, &starts)?.map(|part| part.swap_axes(-1, -2)?.expand_dims(1))?;
        let places = arange::<_, f32>(None, self.columns, None)?;
        let of_places = powers(self.exponent, &places)?.map(|part| part.expand_dims(1))?;
        let begun = weights.map(|part| part.expand_dims(-2))?.times(&of_rows)?;
        let real = matmul(&begun.real, &of_places.real)?;
        let sums = real.subtract(matmul(&begun.imaginary, &of_places.imaginary)?)?;
        let flat = [&weights.real.shape()[..weights.real.ndim() - 1], &[-1]].concat();
        let steps = sums.reshape(&flat)?.try_index((Ellipsis, ..self.length))?;
        Ok(steps.multiply(uploads::float(2.0))?)
    }

    /// `Σ_t exp(exponent · (L − 1 − t)) · u_t`: of `[B, H, M, L]` `[B, H, M, N / 2]`.
    fn gather(&self, u: &Array) -> Result<Complex> {
        let Self { rows, columns, .. } = *self;
        let ahead = [(0, 0), (0, 0), (0, 0), (rows * columns - self.length, 0)];
        let grid = [&u.shape()[..3], &[rows, columns]].concat();
        let u = pad(u, &ahead, None, None)?.reshape(&grid)?;
        let left = |count: i32| arange::<_, f32>(count - 1, -1, -1);
        let of_places = powers(self.exponent, &left(columns)?)?;
        let of_rows = left(rows)?.multiply(uploads::float(columns as f32))?;
        let turned = |part: &Array| part.swap_axes(-1, -2)?.expand_dims(1);
        let of_rows = powers(self.exponent, &of_rows)?.map(turned)?;
        let by_row = of_places.map(|part| matmul(&u, turned(part)?))?;
        Ok(by_row.times(&of_rows)?.map(|part| part.sum_axis(-2, false))?)
    }
}

/// `y_t = Σ_s kernel_s · u_{t−s}` along the last axis of `[B, H, M, L]` and `[H, 1, L]`.
fn causal_product(u: &Array, kernel: &Array) -> Result<Array> {
    let length = u.dim(-1);
    // Room for the end not to come around to the beginning.
    let room = length.unsigned_abs().saturating_mul(2).next_power_of_two();
    let room = i32::try_from(room).unwrap_or(i32::MAX);
    let product = rfft(u, room, -1)?.multiply(rfft(kernel, room, -1)?)?;
    Ok(irfft(product, room, -1)?.try_index((Ellipsis, ..length))?)
}

/// The imaginary parts above zero of the eigenvalues of the normal part of HiPPO-LegS with `states` states: `[N / 2]`.
///
/// That part is −1/2 and a skew-symmetric matrix, of elements `±√((2n + 1)(2k + 1)) / 2`. MLX finds the eigenvalues of `i`
/// times that one, which are real, on the CPU.
fn frequencies(states: i32) -> Result<Array> {
    let root = |n: i32| f64::from(2 * n + 1).sqrt();
    let element = |n: i32, k: i32| {
        let size = root(n) * root(k) / 2.0;
        mlx_rs::complex64::new(0.0, (f64::from((k - n).signum()) * size) as f32)
    };
    let matrix: Vec<_> =
        (0..states).flat_map(|n| (0..states).map(move |k| element(n, k))).collect();
    let matrix = Array::from_slice(&matrix, &[states, states]);
    let eigenvalues = aside(|| eigvalsh(matrix, Some("L")))?;
    Ok(eigenvalues.try_index(states / 2..)?.as_dtype(Dtype::Float32)?)
}

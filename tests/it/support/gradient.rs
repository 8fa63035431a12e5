//! Gradients against central differences of the f64 oracle.

use mlx_primitives::{Backend, Dispatch, Result};
use mlx_rs::{Array, Dtype, error::Exception, transforms::fallible_vjp};

use super::{
    backends::on_backends,
    compare::{Tolerance, assert_close},
    sample::Random,
    tensor::Tensor,
};

/// Far below the curvature of any operation here, far above f64 rounding.
const STEP: f64 = 1e-5;

/// Checks, on each backend, the gradient of `ours` with respect to every input against `oracle`'s.
pub(crate) fn gradients_on_each_backend(
    op: &str,
    inputs: &[Tensor],
    oracle: impl Fn(&[Tensor]) -> Tensor,
    ours: impl Fn(&[Array], Dispatch) -> Result<Array>,
) {
    gradients_on_backends(Backend::ALL, op, inputs, oracle, ours);
}

/// [`gradients_on_each_backend`] with some of the backends.
pub(crate) fn gradients_on_backends(
    backends: &[Backend],
    op: &str,
    inputs: &[Tensor],
    oracle: impl Fn(&[Tensor]) -> Tensor,
    ours: impl Fn(&[Array], Dispatch) -> Result<Array>,
) {
    let arrays = to_arrays(inputs);
    on_backends(
        backends,
        op,
        |dispatch| ours(&arrays, dispatch),
        |backend, _| {
            let what = format!("{op} on {backend}");
            let on_backend = |arrays: &[Array]| ours(arrays, Dispatch::Only(backend));
            assert_gradients(&what, inputs, &oracle, on_backend);
        },
    );
}

/// Checks the gradient of `ours` with respect to every input against that of `oracle`.
pub(crate) fn assert_gradients(
    what: &str,
    inputs: &[Tensor],
    oracle: impl Fn(&[Tensor]) -> Tensor,
    ours: impl Fn(&[Array]) -> Result<Array>,
) {
    let cotangent = cotangent_like(&oracle(inputs));
    let arrays = to_arrays(inputs);
    let (_, gradients) = fallible_vjp(
        |arrays: &[Array]| Ok(vec![ours(arrays).map_err(Exception::from)?]),
        &arrays,
        &[cotangent.to_array(Dtype::Float32)],
    )
    .unwrap_or_else(|error| panic!("{what}: {error}"));
    for (which, gradient) in gradients.iter().enumerate() {
        let expected = differences(inputs, which, &oracle, &cotangent);
        assert_close(
            &format!("{what}: gradient of input {which}"),
            gradient,
            &expected,
            Tolerance::GRADIENT,
        );
    }
}

/// [`gradients_on_each_backend`] in f16, which `inputs` are rounded to: off by no more than a thousandth of the largest number
/// of a gradient, of which its own rounding may be half.
pub(crate) fn f16_gradients_on_each_backend(
    op: &str,
    inputs: &[Tensor],
    oracle: impl Fn(&[Tensor]) -> Tensor,
    ours: impl Fn(&[Array], Dispatch) -> Result<Array>,
) {
    let arrays: Vec<_> = inputs.iter().map(|input| input.to_array(Dtype::Float16)).collect();
    let inputs: Vec<_> = arrays.iter().map(Tensor::of).collect();
    let cotangent = cotangent_like(&oracle(&inputs)).to_array(Dtype::Float16);
    let slopes = |which| differences(&inputs, which, &oracle, &Tensor::of(&cotangent));
    let expected: Vec<_> = (0..inputs.len()).map(slopes).collect();
    let run = |dispatch| {
        let run = |arrays: &[Array]| Ok(vec![ours(arrays, dispatch).map_err(Exception::from)?]);
        let y = ours(&arrays, dispatch)?;
        assert_eq!(y.dtype(), Dtype::Float16, "{op}");
        Ok(fallible_vjp(run, &arrays, std::slice::from_ref(&cotangent))?.1)
    };
    on_backends(Backend::ALL, op, run, |backend, gradients| {
        for (which, (gradient, expected)) in gradients.iter().zip(&expected).enumerate() {
            let what = format!("{op} on {backend}: gradient of input {which} in f16");
            let largest = expected.values.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
            let tolerance = Tolerance { rtol: 0.0, atol: 1e-3 * largest };
            assert_close(&what, gradient, expected, tolerance);
        }
    });
}

fn to_arrays(inputs: &[Tensor]) -> Vec<Array> {
    inputs.iter().map(|input| input.to_array(Dtype::Float32)).collect()
}

fn cotangent_like(output: &Tensor) -> Tensor {
    let mut random = Random::new(0xC0);
    Tensor::new(&output.shape, output.values.iter().map(|_| random.normal()).collect())
}

fn differences(
    inputs: &[Tensor],
    which: usize,
    oracle: impl Fn(&[Tensor]) -> Tensor,
    cotangent: &Tensor,
) -> Tensor {
    let loss_at = |flat: usize, step: f64| {
        let mut moved = inputs.to_vec();
        moved[which].values[flat] += step;
        let output = oracle(&moved);
        output.values.iter().zip(&cotangent.values).map(|(y, c)| y * c).sum::<f64>()
    };
    let slopes = (0..inputs[which].values.len())
        .map(|flat| (loss_at(flat, STEP) - loss_at(flat, -STEP)) / (2.0 * STEP))
        .collect();
    Tensor::new(&inputs[which].shape, slopes)
}

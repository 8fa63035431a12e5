//! What every bench shares: cases as data, the check that comes before the clock, the clock, and
//! what becomes of its reading.

mod backend;
mod blas;
mod case;
mod ceiling;
mod check;
mod inputs;
mod machine;
mod measure;
mod quiet;
pub(crate) mod results;
mod timing;

pub(crate) use self::{
    case::{Case, Run, Setting, Work, compiled, mlx, ours, reference, widened, with_gradients},
    check::Tolerance,
    inputs::normal,
    machine::describe,
    measure::{check, measure},
};

/// Sizes as a row of results shows them: `4x32x4096x128`.
pub(crate) fn sizes(shape: &[i32]) -> String {
    shape.iter().map(i32::to_string).collect::<Vec<_>>().join("x")
}

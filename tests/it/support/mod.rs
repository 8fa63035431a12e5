//! The ladder of trust: an f64 oracle checks every backend, and finite differences of the oracle
//! check gradients.

pub(crate) mod backends;
pub(crate) mod compare;
pub(crate) mod gradient;
pub(crate) mod host;
pub(crate) mod modules;
pub(crate) mod rows;
pub(crate) mod sample;
pub(crate) mod tensor;

use mlx_rs::Dtype;

/// The element types that every floating-point operation takes.
pub(crate) const FLOATING: [Dtype; 3] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];

/// The number that an e4m3 float is: a sign, four bits of exponent, three of fraction.
pub(crate) fn e4m3(bits: u8) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 3 & 15), f64::from(bits & 7) / 8.0);
    let size = match (exponent, bits & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction * 2_f64.powi(-6),
        _ => (1.0 + fraction) * 2_f64.powi(exponent - 7),
    };
    if bits & 128 == 0 { size } else { -size }
}

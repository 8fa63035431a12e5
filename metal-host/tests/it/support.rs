//! What the tests share: the runner, kernel files, and numbers as bytes.

use std::{fs, path::Path, sync::OnceLock};

use metal_host::{Element, Error, Host, METAL_TARGET, Source};

/// Whether kernels can be run on this system at all.
const MUST_RUN: bool = cfg!(target_os = "linux");

/// The runner, or none where there is no clang; that is an error only where everything is to be tested.
pub(crate) fn host() -> Option<&'static Host> {
    static HOST: OnceLock<Option<Host>> = OnceLock::new();
    let host = HOST.get_or_init(|| {
        match Host::new(Path::new(env!("CARGO_TARGET_TMPDIR")).join("metal-host")) {
            Ok(host) => Some(host),
            Err(error @ Error::NoCompiler { .. })
                if !MUST_RUN || std::env::var_os("CI").is_none() =>
            {
                eprintln!("skipped: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    });
    host.as_ref()
}

/// The line between helpers and body in a kernel file.
const BODY: &str = "// ---- body ----\n";

/// A kernel file by its name: its path and its text.
pub(crate) fn file(name: &str) -> (String, String) {
    let path = format!("tests/kernels/{name}.metal");
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&path)).unwrap();
    (path, text)
}

/// A kernel file by its name, as the header and body that MLX is given.
pub(crate) fn kernel(name: &str) -> Source {
    let (path, text) = file(name);
    let (helpers, body) = text.split_once(BODY).unwrap();
    let line = text[..text.len() - body.len()].lines().count() + 1;
    Source {
        name: name.to_owned(),
        header: format!("{METAL_TARGET}#line 1 \"{path}\"\n{helpers}"),
        body: format!("#line {line} \"{path}\"\n{body}"),
        ..Source::default()
    }
}

/// Numbers in [-1, 1), the same for the same seed.
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// The types that kernels of floats are tested with.
pub(crate) const FLOATS: [Element; 3] = [Element::F32, Element::F16, Element::BF16];

/// How many bits a type's fraction has.
fn fraction(element: Element) -> i32 {
    match element {
        Element::F32 => 23,
        Element::F16 => 10,
        Element::BF16 => 7,
        _ => panic!("{element:?} is no float"),
    }
}

/// The largest error of rounding to `element`, relative to the value.
pub(crate) fn rounding(element: Element) -> f64 {
    0.5f64.powi(fraction(element) + 1)
}

/// `values` rounded to `element`, as its bytes and as the numbers they now are.
///
/// For numbers whose half-precision form is normal; that is all these tests use.
pub(crate) fn encode(element: Element, values: &[f64]) -> (Vec<u8>, Vec<f64>) {
    let rounded: Vec<_> = values.iter().map(|&value| round(element, value)).collect();
    (rounded.iter().flat_map(|&value| bytes(element, value)).collect(), rounded)
}

/// To the nearest number with as many bits, by adding and taking away a large one.
fn round(element: Element, value: f64) -> f64 {
    if value == 0.0 {
        return value;
    }
    let place = value.abs().log2().floor() as i32 - fraction(element);
    let unit = 2f64.powi(place);
    (value / unit).round_ties_even() * unit
}

fn bytes(element: Element, value: f64) -> Vec<u8> {
    let bits = (value as f32).to_bits();
    match element {
        Element::F32 => bits.to_ne_bytes().to_vec(),
        Element::BF16 => ((bits >> 16) as u16).to_ne_bytes().to_vec(),
        Element::F16 if value.abs() < 2f64.powi(-14) => {
            let sign = (bits >> 16 & 0x8000) as u16;
            let units = (value.abs() * 2f64.powi(24)).round() as u16;
            (sign | units).to_ne_bytes().to_vec()
        }
        Element::F16 => {
            let sign = (bits >> 16 & 0x8000) as u16;
            let magnitude = ((bits & 0x7fff_ffff) - (112 << 23)) >> 13;
            (sign | magnitude as u16).to_ne_bytes().to_vec()
        }
        _ => panic!("{element:?} is no float"),
    }
}

/// The numbers in `bytes`.
pub(crate) fn decode(element: Element, bytes: &[u8]) -> Vec<f64> {
    let value = |chunk: &[u8]| match (element, chunk) {
        (Element::F32, &[a, b, c, d]) => f64::from(f32::from_ne_bytes([a, b, c, d])),
        (Element::BF16, &[a, b]) => {
            f64::from(f32::from_bits(u32::from(u16::from_ne_bytes([a, b])) << 16))
        }
        (Element::F16, &[a, b]) => half(u16::from_ne_bytes([a, b])),
        _ => panic!("{element:?} is no float"),
    };
    bytes.chunks(element.bytes()).map(value).collect()
}

fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 0x3ff));
    match exponent {
        0 => sign * fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => sign * f64::INFINITY,
        31 => f64::NAN,
        _ => sign * (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
    }
}

/// Asserts that every number of `got` is within `bound` of `expected`, which is given for each.
pub(crate) fn assert_close(
    what: &str,
    got: &[f64],
    expected: &[f64],
    bound: impl Fn(usize) -> f64,
) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        assert!(error <= bound(i), "{what}: element {i} is {got}, expected {expected}");
    }
}

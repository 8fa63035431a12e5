//! Runs one case on every backend the machine offers.

use mlx_primitives::{Backend, Dispatch, Error, Result};

use super::host;

/// Backends that an operation does not have at all. A skip that is not listed fails the test, and
/// so does a listed backend that runs.
const ABSENT: &[(&str, Backend)] = &[
    ("activation", Backend::Kernel),
    ("affine_scan", Backend::Builtin),
    ("chunked_cross_attention", Backend::Kernel),
    ("SamplerBatch", Backend::Builtin),
    ("paged_attention", Backend::Builtin),
    ("quantized_linear", Backend::Kernel),
    ("rope", Backend::Kernel),
    ("selective_scan", Backend::Builtin),
    ("ssd_scan", Backend::Builtin),
    ("gated_linear_attention", Backend::Builtin),
    ("gated_delta_rule", Backend::Builtin),
    ("gated_delta_rule", Backend::Kernel),
];

/// Backends that refuse some problems on some devices, which is no failure of theirs.
const REFUSING: &[(&str, Backend, &str)] = &[
    ("layer_norm", Backend::Builtin, LAYER_NORM_GRADIENT),
    ("add_layer_norm", Backend::Builtin, LAYER_NORM_GRADIENT),
    ("rms_norm_linear", Backend::Kernel, "the kernel takes one row"),
    ("rms_norm_linear", Backend::Kernel, "the kernel takes a weight of the dtype of x"),
    ("flash_attention", Backend::Builtin, "MLX's fused attention gives no log-sum-exp"),
    ("flash_attention", Backend::Builtin, "MLX's fused attention has no soft cap"),
    ("flash_attention", Backend::Builtin, "MLX's fused attention has no dropout"),
    ("flash_attention", Backend::Kernel, "the kernel has no dropout"),
    (
        "flash_attention",
        Backend::Builtin,
        "MLX's fused attention would round distances to the dtype",
    ),
    (
        "flash_attention",
        Backend::Builtin,
        "MLX's fused attention takes sinks of the dtype of the queries",
    ),
    ("associative_scan", Backend::Builtin, "MLX's scans know no segments"),
    (
        "associative_scan",
        Backend::Builtin,
        "MLX's CUDA scans along another axis than the last are wrong for several of them",
    ),
    ("gated_linear_attention", Backend::Kernel, "the kernel has one decay for all of a key"),
    ("ssd_scan", Backend::Kernel, "its states exceed threadgroup memory"),
    ("rope_qk", Backend::Builtin, ROPE_POSITIONS),
    ("qk_norm_rope", Backend::Builtin, ROPE_POSITIONS),
];

const LAYER_NORM_GRADIENT: &str = "MLX's CUDA gradient is wrong unless D is a multiple of 4";
const ROPE_POSITIONS: &str = "MLX counts positions from 0 up to 2^24";

/// What any kernel refuses.
const REFUSED_BY_KERNELS: &[&str] = &["a kernel takes no empty array"];

/// Calls `run` with each backend and hands every result to `check`.
pub(crate) fn on_each_backend<T>(
    op: &str,
    run: impl Fn(Dispatch) -> Result<T>,
    check: impl FnMut(Backend, T),
) {
    on_backends(Backend::ALL, op, run, check);
}

/// All backends where `here`, else those that are no kernels.
///
/// Each variant of a kernel is compiled and run in every build, which takes seconds: a long table has one dtype or layout
/// for it in each case, in turn.
pub(crate) fn with_kernels(here: bool) -> &'static [Backend] {
    if here { Backend::ALL } else { &[Backend::Builtin, Backend::Reference] }
}

/// [`on_each_backend`] with some of the backends.
pub(crate) fn on_backends<T>(
    backends: &[Backend],
    op: &str,
    run: impl Fn(Dispatch) -> Result<T>,
    mut check: impl FnMut(Backend, T),
) {
    let no_kernels_here = !host::install();
    for &backend in backends {
        let absent = ABSENT.contains(&(op, backend));
        match run(Dispatch::Only(backend)) {
            Ok(result) => {
                assert!(!absent, "{op}: {backend} is listed as absent but ran");
                check(backend, result);
                println!("checked: {op} on {backend}");
            }
            Err(Error::Unavailable { reason, .. }) => {
                let kernel = backend == Backend::Kernel
                    && (no_kernels_here || REFUSED_BY_KERNELS.contains(&reason.as_str()));
                let listed = absent || kernel || REFUSING.contains(&(op, backend, reason.as_str()));
                assert!(listed, "{op}: {backend} was skipped without being listed: {reason}");
                println!("skipped: {op} on {backend}: {reason}");
            }
            Err(error) => panic!("{op} on {backend}: {error}"),
        }
    }
}

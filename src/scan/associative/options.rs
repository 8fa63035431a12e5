//! What a caller may ask for.

use mlx_rs::Array;

use crate::dispatch::Dispatch;

/// How [`associative_scan`](super::associative_scan) combines two elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScanOperator {
    /// `a + b`; nothing is 0.
    Add,
    /// `a · b`; nothing is 1.
    Mul,
    /// The larger; nothing is −∞.
    Max,
    /// The smaller; nothing is ∞.
    Min,
    /// `log(exp(a) + exp(b))`; nothing is −∞.
    LogAddExp,
}

/// Options of [`associative_scan`](super::associative_scan) and [`affine_scan`](super::affine_scan()).
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions<'a> {
    /// The axis that is scanned, counted from the end where below zero. Default: −1.
    pub axis: i32,
    /// Whether a result leaves out the element beside it, and so is the state before it. Default: no.
    pub exclusive: bool,
    /// Whether the last element comes first. Default: no.
    pub reverse: bool,
    /// What comes before the first element: f32, f16 or bf16, or complex64 where the scan is, of the shape of `x`
    /// without the axis; with segments, of the shape of `x` with `N` along the axis, one for each. Default: nothing,
    /// which is zero for an affine scan.
    pub initial_state: Option<&'a Array>,
    /// `N + 1` numbers of sequences of several lengths that lie one after another along the axis, the same in all rows.
    /// Sequence `n` is `segments[n]..segments[n + 1]`, which may be empty; each begins anew, and nothing, not even NaN,
    /// comes through to its results from another. The numbers start at 0, do not fall, and end at the length of the axis. They are
    /// those of the host, as [`SelectiveScanOptions::segments`](crate::scan::SelectiveScanOptions::segments), so that
    /// all are checked; a compiled graph keeps them. Default: one.
    pub segments: Option<&'a [i32]>,
    /// Who picks the backend.
    pub dispatch: Dispatch,
}

impl Default for ScanOptions<'_> {
    fn default() -> Self {
        Self {
            axis: Self::DEFAULT_AXIS,
            exclusive: false,
            reverse: false,
            initial_state: None,
            segments: None,
            dispatch: Dispatch::Auto,
        }
    }
}

impl ScanOptions<'_> {
    /// The default of [`ScanOptions::axis`].
    pub const DEFAULT_AXIS: i32 = -1;
}

//! The file of a run, and the table a person reads. `cargo xtask` has this file too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What one device did; a file of `benches/results/`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) device: String,
    /// MLX's release.
    pub(crate) mlx: String,
    /// The library behind MLX's matrix products.
    pub(crate) blas: String,
    /// Whether MLX rounded the factors of f32 products to TF32.
    pub(crate) tf32: bool,
    pub(crate) rows: Vec<Row>,
}

/// One operation on one problem. Times are of one call, in microseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) op: String,
    pub(crate) shape: String,
    pub(crate) dtype: String,
    /// What `Dispatch::Auto` took; `ops` where there was no choice.
    pub(crate) ours_backend: String,
    pub(crate) ours_us: f64,
    /// The fastest that MLX offers.
    pub(crate) baseline: String,
    pub(crate) baseline_us: f64,
    /// What else MLX offers, and its times.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) slower_us: BTreeMap<String, f64>,
    /// Above one, ours is faster.
    pub(crate) ratio: f64,
    /// The time of a plain copy of the same bytes, or of the same flops in a large matrix product,
    /// over ours.
    pub(crate) ceiling_fraction: f64,
    /// The most that was allocated during one call beyond its inputs.
    pub(crate) peak_bytes: usize,
    pub(crate) baseline_peak_bytes: usize,
    /// The largest distance from the reference.
    pub(crate) max_error: f64,
}

const HEAD: [&str; 9] =
    ["operation", "shape", "dtype", "backend", "µs", "best of MLX", "µs", "ratio", "of ceiling"];
/// Columns of numbers, which stand on the right.
const NUMBERS: [usize; 4] = [4, 6, 7, 8];

impl Results {
    /// Device and libraries in one line.
    pub(crate) fn heading(&self) -> String {
        let tf32 = if self.tf32 { ", TF32" } else { "" };
        format!("{}, MLX {}, {}{tf32}", self.device, self.mlx, self.blas)
    }

    /// The rows as Markdown that also lines up on a terminal.
    pub(crate) fn table(&self) -> String {
        let mut lines = vec![HEAD.map(str::to_owned)];
        lines.extend(self.rows.iter().map(Row::cells));
        let width = |column: usize| {
            lines.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0)
        };
        let widths = std::array::from_fn(width);
        let mut text: Vec<_> = lines.iter().map(|cells| padded(cells, &widths)).collect();
        text.insert(1, rule(&widths));
        text.concat()
    }
}

impl Row {
    fn cells(&self) -> [String; HEAD.len()] {
        [
            self.op.clone(),
            self.shape.clone(),
            self.dtype.clone(),
            self.ours_backend.clone(),
            short(self.ours_us),
            self.baseline.clone(),
            short(self.baseline_us),
            format!("{:.2}", self.ratio),
            format!("{:.0} %", 100.0 * self.ceiling_fraction),
        ]
    }
}

/// Three digits, unless there are more before the point.
fn short(microseconds: f64) -> String {
    let digits = match microseconds {
        m if m < 10.0 => 2,
        m if m < 100.0 => 1,
        _ => 0,
    };
    format!("{microseconds:.digits$}")
}

fn padded(cells: &[String; HEAD.len()], widths: &[usize; HEAD.len()]) -> String {
    let cell = |(column, text): (usize, &String)| match widths[column] {
        width if NUMBERS.contains(&column) => format!(" {text:>width$} |"),
        width => format!(" {text:<width$} |"),
    };
    format!("|{}\n", cells.iter().enumerate().map(cell).collect::<String>())
}

fn rule(widths: &[usize; HEAD.len()]) -> String {
    let dashes = |(column, width): (usize, &usize)| match NUMBERS.contains(&column) {
        true => format!("{}:|", "-".repeat(width + 1)),
        false => format!("{}|", "-".repeat(width + 2)),
    };
    format!("|{}\n", widths.iter().enumerate().map(dashes).collect::<String>())
}

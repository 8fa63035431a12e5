//! The tables of MEASUREMENTS.md, made of the files in `benches/results/`.
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::results::Results;
use crate::paths;

const START: &str = "<!-- speed: `cargo xtask bench --report` writes what follows -->";
const END: &str = "<!-- end of speed -->";

const PAGE: &str = "MEASUREMENTS.md";

/// Puts the results of every file into the page.
pub(crate) fn write() -> Result<()> {
    let page = paths::root().join(PAGE);
    let text = fs::read_to_string(&page)?;
    let fresh = with_tables(&text, &kept()?)?;
    if fresh != text {
        fs::write(&page, fresh)?;
        eprintln!("wrote {}", page.display());
    }
    Ok(())
}

/// What the files hold, in the order of their names.
fn kept() -> Result<Vec<Results>> {
    let folder = paths::root().join("benches/results");
    let entries = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path()));
    let mut files = entries.collect::<Result<Vec<PathBuf>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    let read = |file: &PathBuf| {
        let text = fs::read_to_string(file)?;
        serde_json::from_str(&text).with_context(|| format!("{} is no results", file.display()))
    };
    files.iter().map(read).collect()
}

/// `page` with a table for each of `results` between the markers.
fn with_tables(page: &str, results: &[Results]) -> Result<String> {
    let (before, rest) = page.split_once(START).context("the start marker is missing")?;
    let (_, after) = rest.split_once(END).context("the end marker is missing")?;
    let tables: Vec<_> = results.iter().map(section).collect();
    Ok(format!("{before}{START}\n{}\n{END}{after}", tables.concat()))
}

fn section(results: &Results) -> String {
    format!("\n#### {}\n\n{}", results.heading(), results.table())
}

#[cfg(test)]
mod tests {
    use super::super::results::Row;
    use super::*;

    fn results() -> Results {
        let row = Row {
            op: "rms_norm".into(),
            shape: "16384x4096".into(),
            dtype: "bfloat16".into(),
            ours_backend: "kernel".into(),
            ours_us: 65.04,
            baseline: "fast.rms_norm".into(),
            baseline_us: 110.4,
            slower_us: [("compiled".into(), 140.2)].into(),
            ratio: 1.697,
            ceiling_fraction: 0.904,
            peak_bytes: 134_217_728,
            baseline_peak_bytes: 134_217_728,
            max_error: 0.0078,
        };
        let slow = Row { op: "op".into(), ours_us: 4570.6, ratio: 0.05, ..row.clone() };
        Results {
            device: "A GPU".into(),
            mlx: "0.32.2".into(),
            blas: "cuBLAS 13".into(),
            tf32: false,
            rows: vec![row, slow],
        }
    }

    #[test]
    fn the_page_shows_what_the_files_hold() -> Result<()> {
        let page = fs::read_to_string(paths::root().join(PAGE))?;
        let kept = kept()?;
        assert!(!kept.is_empty());
        assert!(with_tables(&page, &kept)? == page, "run: cargo xtask bench --report");
        Ok(())
    }

    #[test]
    fn tables_replace_what_stood_between_the_markers() -> Result<()> {
        let page = format!("before\n{START}\nold\n{END}\nafter\n");
        let once = with_tables(&page, &[results(), results()])?;
        let head = format!("before\n{START}\n\n#### A GPU, MLX 0.32.2, cuBLAS 13\n\n| operation ");
        assert!(once.starts_with(&head), "{once}");
        assert!(once.ends_with(&format!("|\n\n{END}\nafter\n")), "{once}");
        assert!(!once.contains("old"));
        assert_eq!(with_tables(&once, &[results(), results()])?, once);
        assert!(with_tables("before\nafter\n", &[]).is_err());
        Ok(())
    }

    #[test]
    fn a_table_lines_up() {
        let expected = "\
| operation | shape      | dtype    | backend |   µs | best of MLX   |  µs | ratio | of ceiling |
|-----------|------------|----------|---------|-----:|---------------|----:|------:|-----------:|
| rms_norm  | 16384x4096 | bfloat16 | kernel  | 65.0 | fast.rms_norm | 110 |  1.70 |       90 % |
| op        | 16384x4096 | bfloat16 | kernel  | 4571 | fast.rms_norm | 110 |  0.05 |       90 % |
";
        assert_eq!(results().table(), expected);
    }

    #[test]
    fn the_heading_says_when_products_were_rounded() {
        let rounded = Results { tf32: true, ..results() };
        assert_eq!(rounded.heading(), "A GPU, MLX 0.32.2, cuBLAS 13, TF32");
    }

    #[test]
    fn a_file_has_the_agreed_keys_and_comes_back() -> Result<()> {
        let json = serde_json::to_value(results())?;
        let keys = |value: &serde_json::Value| {
            let mut keys: Vec<_> =
                value.as_object().into_iter().flatten().map(|(k, _)| k.clone()).collect();
            keys.sort();
            keys.join(" ")
        };
        assert_eq!(keys(&json), "blas device mlx rows tf32");
        let row = "baseline baseline_peak_bytes baseline_us ceiling_fraction dtype max_error op \
                   ours_backend ours_us peak_bytes ratio shape slower_us";
        assert_eq!(keys(&json["rows"][0]), row);
        assert_eq!(serde_json::from_value::<Results>(json)?, results());
        Ok(())
    }
}

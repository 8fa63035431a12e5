//! One case, from its inputs to its row.

use anyhow::{Context, Result, ensure};
use mlx_primitives::dispatch::Target;
use mlx_rs::{Array, memory, transforms::eval};

use super::{
    backend::taken_by,
    case::Case,
    ceiling,
    check::{Tolerance, compare},
    results::Row,
    timing::{Contender, measure_in_turn},
};

/// What the check found out.
pub(crate) struct Checked {
    backend: String,
    max_error: f64,
}

/// Computes every contender's results once and compares them with the reference.
pub(crate) fn check(case: &mut Case) -> Result<Checked> {
    eval(&case.inputs)?;
    let expected = (case.reference)(&case.inputs).context("the reference")?;
    eval(&expected).context("the reference")?;
    let (got, backend) = taken_by(|| (case.ours)(&case.inputs));
    let verdict =
        |got: &[Array], tolerance: Tolerance| compare(got, &expected, case.dtype, tolerance);
    let max_error = verdict(&got.context("ours")?, case.tolerance).context("ours")?;
    ensure!(!case.baselines.is_empty(), "nothing of MLX to compare with");
    for (name, run) in &mut case.baselines {
        let got = run(&case.inputs).context(*name)?;
        verdict(&got, case.tolerance.of_baseline(case.dtype)).context(*name)?;
    }
    Ok(Checked { backend: backend.unwrap_or_else(|| "ops".to_owned()), max_error })
}

/// Times a case that was checked.
pub(crate) fn measure(case: &mut Case, checked: Checked, target: Target) -> Result<Row> {
    let Case { op, shape, dtype, inputs, work, ours, baselines, .. } = case;
    // What the check left in MLX's cache is no memory that this case needs.
    memory::clear_cache()?;
    let mut ceiling = ceiling::of(*work, *dtype, target)?;
    eval(&ceiling.inputs)?;
    let mut contenders = vec![
        Contender::new("ceiling", &mut ceiling.run, &ceiling.inputs)?,
        Contender::new("ours", ours, inputs)?,
    ];
    for (name, run) in baselines {
        contenders.push(Contender::new(name, run, inputs)?);
    }
    measure_in_turn(&mut contenders)?;
    let (ideal, ours, best) = standings(&contenders).context("nothing was measured")?;
    let slower = contenders[2..].iter().filter(|other| other.name != best.name);
    let ceiling_us = ideal.microseconds() / ceiling.amount;
    Ok(Row {
        op: (*op).to_owned(),
        shape: shape.clone(),
        dtype: format!("{dtype:?}").to_lowercase(),
        ours_backend: checked.backend,
        ours_us: rounded(ours.microseconds(), 2),
        baseline: best.name.to_owned(),
        baseline_us: rounded(best.microseconds(), 2),
        slower_us: slower
            .map(|other| (other.name.to_owned(), rounded(other.microseconds(), 2)))
            .collect(),
        ratio: rounded(best.microseconds() / ours.microseconds(), 3),
        ceiling_fraction: rounded(ceiling_us / ours.microseconds(), 3),
        peak_bytes: ours.peak_bytes,
        baseline_peak_bytes: best.peak_bytes,
        max_error: checked.max_error,
    })
}

/// The ceiling, ours, and the fastest of the others.
fn standings<'a, 'b>(
    contenders: &'b [Contender<'a>],
) -> Option<(&'b Contender<'a>, &'b Contender<'a>, &'b Contender<'a>)> {
    let [ceiling, ours, others @ ..] = contenders else { return None };
    let by_time =
        |a: &&Contender<'_>, b: &&Contender<'_>| a.microseconds().total_cmp(&b.microseconds());
    Some((ceiling, ours, others.iter().min_by(by_time)?))
}

/// What the clock can tell, so that a file is not full of digits that mean nothing.
fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10_f64.powi(digits);
    (value * unit).round() / unit
}

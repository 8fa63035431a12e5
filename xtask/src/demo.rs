//! Runs the text generation example on a real model.
use std::ffi::{OsStr, OsString};

use anyhow::Result;

use crate::{model, setup, steps};

const PROMPT: &str = "Explain in two sentences why the sky is blue.";

/// Runs the example with `args`, plus a model and a prompt where they name none.
pub(crate) fn run(args: Vec<OsString>) -> Result<()> {
    setup()?;
    let given = complete(args, || Ok(model::provide()?.into()))?;
    let example = ["--release", "--example", "generate"];
    let mut build = steps::cargo(["build"]);
    steps::run(build.args(steps::features()).args(example))?;
    // Quiet, now that it is built: what follows on the screen is the example's alone.
    let mut run = steps::cargo(["run", "--quiet"]);
    steps::run(run.args(steps::features()).args(example).arg("--").args(given))
}

fn complete(
    args: Vec<OsString>,
    model: impl FnOnce() -> Result<OsString>,
) -> Result<Vec<OsString>> {
    let mut all = Vec::new();
    if !names(&args, "--help") && !names(&args, "-h") {
        if !names(&args, "--model") {
            all.extend(["--model".into(), model()?]);
        }
        if !names(&args, "--prompt") {
            all.extend(["--prompt", PROMPT].map(OsString::from));
        }
    }
    all.extend(args);
    Ok(all)
}

/// Whether `args` hold `flag`, alone or as `flag=value`.
fn names(args: &[OsString], flag: &str) -> bool {
    let is = |arg: &OsStr| {
        let rest = arg.as_encoded_bytes().strip_prefix(flag.as_bytes());
        rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'=')
    };
    args.iter().any(|arg| is(arg))
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn completed(args: &[&str]) -> Result<Vec<OsString>> {
        complete(args.iter().map(OsString::from).collect(), || Ok("/m.gguf".into()))
    }

    #[test]
    fn model_and_prompt_are_added_where_missing() -> Result<()> {
        assert_eq!(completed(&[])?, ["--model", "/m.gguf", "--prompt", PROMPT]);
        let asked = completed(&["--prompt=hi", "--json", "--seed", "7"])?;
        assert_eq!(asked, ["--model", "/m.gguf", "--prompt=hi", "--json", "--seed", "7"]);
        assert_eq!(completed(&["--modeling"])?[..2], ["--model", "/m.gguf"]);
        Ok(())
    }

    #[test]
    fn own_model_is_not_fetched() -> Result<()> {
        for args in [["--model", "x"], ["--model=x", "--json"], ["--help", "-v"]] {
            complete(args.map(OsString::from).into(), || bail!("fetched"))?;
        }
        assert_eq!(completed(&["-h"])?, ["-h"]);
        Ok(())
    }
}

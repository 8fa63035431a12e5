//! The script that starts a bundle's programs.

pub(super) const SCRIPT: &str = include_str!("run.sh");

#[cfg(test)]
mod tests {
    use std::process::Command;

    use anyhow::Result;

    use super::*;
    use crate::steps;

    #[test]
    fn script_parses_and_names_its_programs() -> Result<()> {
        let mut bash = Command::new("bash");
        let output = steps::output(bash.args(["-c", SCRIPT, "run.sh"]))?;
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("usage: run.sh PROGRAM"));
        Ok(())
    }
}

//! The scripts that start a bundle's programs.

/// By name.
pub(super) const SCRIPTS: [(&str, &str); 2] =
    [("run.sh", include_str!("run.sh")), ("each-test.sh", include_str!("each-test.sh"))];

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::PermissionsExt as _,
        path::Path,
        process::{Command, Output},
    };

    use anyhow::Result;

    use super::*;
    use crate::steps;

    /// Says that tests are `a::passes`, `a::fails` and `b::passes`.
    const RUN: &str = r#"#!/usr/bin/env bash
case "$2 ${3:-}" in
  "--list "*) printf '%s\n' "a::passes: test" "a::fails: test" "b::passes: test" "" "3 tests, 0 benchmarks" ;;
  "--exact "*passes) echo "test result: ok. 1 passed; 0 failed"; exit 134 ;;
  *) echo "test result: FAILED. 0 passed; 1 failed"; exit 101 ;;
esac
"#;

    #[test]
    fn scripts_parse_and_say_what_they_need() -> Result<()> {
        for ((name, script), words) in
            SCRIPTS.into_iter().zip(["usage: run.sh PROGRAM", "each-test.sh: there is no"])
        {
            let mut bash = Command::new("bash");
            let output = steps::output(bash.args(["-c", script, name]))?;
            assert_eq!(output.status.code(), Some(2), "{name}");
            assert!(String::from_utf8_lossy(&output.stderr).starts_with(words), "{name}");
        }
        Ok(())
    }

    #[test]
    fn a_test_fails_alone_and_one_that_dies_after_it_passed_has_passed() -> Result<()> {
        let output = each_test(RUN)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("FAILED (101) a::fails\n2 passed, 1 failed; see "), "{said}");
        Ok(())
    }

    #[test]
    fn tests_that_cannot_be_listed_have_not_passed() -> Result<()> {
        for run in
            ["#!/usr/bin/env bash\necho no such library >&2\nexit 127\n", "#!/usr/bin/env bash\n"]
        {
            assert_ne!(each_test(run)?.status.code(), Some(0), "{run}");
        }
        Ok(())
    }

    /// What the script does in a bundle whose programs run by `run`.
    fn each_test(run: &str) -> Result<Output> {
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("bin"))?;
        for (name, text) in [SCRIPTS[1], ("run.sh", run), ("bin/test-it", "")] {
            executable(&path(name), text)?;
        }
        let mut script = Command::new(path("each-test.sh"));
        steps::output(script.env("LOGS", path("logs")))
    }

    fn executable(path: &Path, text: &str) -> Result<()> {
        fs::write(path, text)?;
        Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
    }
}

//! What a run that failed says about its kernel.

use std::process::ExitStatus;

use crate::{
    error::{Error, Finding, Kind},
    launch::Run,
    place::{self, Place},
    source::Source,
};

/// Reads the finding off `said`, what the process wrote as it ended.
pub(crate) fn read(source: &Source, run: &Run, status: ExitStatus, said: String) -> Error {
    let files = place::files(source);
    let reader = Reader { said: &said, files: &files };
    let found = reader.runtime(source).or_else(|| reader.sanitizer());
    let (kind, place, message) = match found {
        Some(found) => found,
        None if status.code().is_some() => {
            let message = format!("the runner failed ({status}): {said}");
            return Error::Machine { kernel: source.name.clone(), message };
        }
        None => (Kind::Crash, None, format!("the kernel's process died: {status}")),
    };
    finding(source, run, kind, place, message, said)
}

/// A finding of `kind`, at the body's first line if its place is not known.
pub(crate) fn finding(
    source: &Source,
    run: &Run,
    kind: Kind,
    place: Option<Place>,
    message: String,
    report: String,
) -> Error {
    Error::Finding(Finding {
        kind,
        kernel: source.name.clone(),
        place: place.unwrap_or_else(|| place::of_body(source)),
        message,
        build: run.build,
        schedule: run.schedule,
        poison: run.poison,
        report,
    })
}

type Found = (Kind, Option<Place>, String);

struct Reader<'a> {
    said: &'a str,
    files: &'a [String],
}

impl<'a> Reader<'a> {
    /// The runtime's own line: `msl-finding`, the kind, file, line, column and message, with tabs between.
    fn runtime(&self, source: &Source) -> Option<Found> {
        let line = self.said.lines().find_map(|line| line.strip_prefix("msl-finding\t"))?;
        let [kind, file, line, _column, message] = line.splitn(5, '\t').collect::<Vec<_>>()[..]
        else {
            return None;
        };
        let place = Place { file: file.to_owned(), line: line.parse().ok()? };
        match kind {
            "divergence" => Some((Kind::Divergence, Some(place), message.to_owned())),
            "threadgroup memory" => {
                Some((Kind::ThreadgroupMemory, Some(place), message.to_owned()))
            }
            "output" => self.output(source, message),
            _ => None,
        }
    }

    /// `0 12`, what is returned and a byte of it; before it MemorySanitizer told which store the byte came from.
    fn output(&self, source: &Source, at: &str) -> Option<Found> {
        let (output, byte) = at.split_once(' ')?;
        let output = source.returned().nth(output.parse().ok()?)?;
        let element = byte.parse::<usize>().ok()? / output.element.bytes();
        let element = format!("element {element} of `{}`", output.name);
        let stored = self.said.split_once("Uninitialized value was stored to memory at");
        let stored = stored.and_then(|(_, origin)| self.frames(origin));
        Some(match stored {
            None => (Kind::Unwritten, None, format!("{element} was never written")),
            place => (Kind::Uninitialised, place, format!("{element} was made from such memory")),
        })
    }

    fn sanitizer(&self) -> Option<Found> {
        let marks = [
            ("WARNING: ThreadSanitizer: ", Kind::Race),
            ("WARNING: MemorySanitizer: ", Kind::Uninitialised),
            ("ERROR: AddressSanitizer: ", Kind::Address),
            // What is neither's to find, such as running over a stack.
            ("ERROR: ThreadSanitizer: ", Kind::Crash),
            ("ERROR: MemorySanitizer: ", Kind::Crash),
            (": runtime error: ", Kind::Undefined),
        ];
        marks.into_iter().find_map(|(mark, kind)| {
            let (before, after) = self.said.split_once(mark)?;
            let what = after.lines().next().unwrap_or_default();
            let what = what.split(" (pid=").next().unwrap_or(what);
            let what = what.split(" on address").next().unwrap_or(what);
            match kind {
                Kind::Undefined => {
                    let line = before.lines().next_back().unwrap_or_default();
                    // What UndefinedBehaviorSanitizer sees of an array whose length is in its type.
                    let outside = what.contains("out of bounds");
                    let kind = if outside { Kind::Address } else { kind };
                    Some((kind, self.undefined(line, mark, after), what.to_owned()))
                }
                Kind::Race => Some((kind, self.frames(after), self.race(after))),
                Kind::Address => Some((kind, self.frames(after), self.address(what, after))),
                _ => Some((kind, self.frames(after), what.to_owned())),
            }
        })
    }

    fn frames(&self, text: &str) -> Option<Place> {
        place::of_frames(text.lines(), self.files)
    }

    /// The report names the place itself, unless that lies in the library: then the first frame above it does.
    fn undefined(&self, line: &str, mark: &str, after: &str) -> Option<Place> {
        let named = place::of_diagnostic(&format!("{line}{mark}"));
        named.filter(|place| self.files.contains(&place.file)).or_else(|| self.frames(after))
    }

    /// Both sides of a race: a line for each access, then its frames.
    fn race(&self, text: &str) -> String {
        let paragraphs = text.split("\n\n").filter_map(|paragraph| {
            let lines = || paragraph.lines().skip_while(|line| !is_access(line));
            let access = lines().next()?.trim();
            let access = access.split(" at 0x").next().unwrap_or(access).to_lowercase();
            let place = place::of_frames(lines(), self.files);
            Some(place.map_or(access.clone(), |place| format!("{access} in line {}", place.line)))
        });
        paragraphs.take(2).collect::<Vec<_>>().join(", ")
    }

    /// What was accessed, and how far from which block.
    fn address(&self, what: &str, text: &str) -> String {
        let size =
            text.lines().find(|line| line.starts_with("READ of") || line.starts_with("WRITE of"));
        let size = size.and_then(|line| line.split(" at ").next()).map(str::to_lowercase);
        let block = text.lines().find_map(|line| line.split_once(" is located "));
        let block = block.map(|(_, place)| place.split(" [").next().unwrap_or(place).to_owned());
        let parts = [Some(what.to_owned()), size, block];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

fn is_access(line: &&str) -> bool {
    let line = line.trim_start();
    ["Write of", "Read of", "Atomic write of", "Atomic read of", "Previous"]
        .iter()
        .any(|start| line.starts_with(start))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;
    use crate::{Element, Output};

    /// What is made of `said` by a process that ended with exit code 1.
    fn of(said: &str) -> Error {
        let source = Source {
            name: "k".into(),
            outputs: vec![Output::new("y", Element::F32, [4])],
            body: "#line 5 \"a.metal\"\ny[0] = 1;".into(),
            ..Source::default()
        };
        read(&source, &Run::default(), ExitStatus::from_raw(1 << 8), said.to_owned())
    }

    #[track_caller]
    fn assert_finding(said: &str, kind: Kind, line: u32, message: &str) {
        match of(said) {
            Error::Finding(finding) => {
                assert_eq!((finding.kind, finding.place.line), (kind, line), "{finding}");
                assert_eq!(finding.message, message);
            }
            other => unreachable!("{other}"),
        }
    }

    #[test]
    fn the_runtime_speaks_in_one_line() {
        let line = "noise\n\nmsl-finding\tdivergence\ta.metal\t7\t3\tthread 1 waits, but thread 2 has returned\n";
        assert_finding(line, Kind::Divergence, 7, "thread 1 waits, but thread 2 has returned");
        let line = "msl-finding\toutput\t\t0\t0\t0 9\n";
        assert_finding(line, Kind::Unwritten, 5, "element 2 of `y` was never written");
    }

    #[test]
    fn a_race_has_two_sides() {
        let said = "WARNING: ThreadSanitizer: data race (pid=1)\n  Write of size 4 at 0x1 by thread T2:\n    \
            #0 f /r/a.metal:9 (k.so+0x1)\n\n  Previous read of size 4 at 0x1 by thread T1:\n    \
            #0 g /lib/x.h:2\n    #1 f /r/a.metal:6 (k.so+0x2)\n\n  Location is heap block\n";
        let message = "write of size 4 in line 9, previous read of size 4 in line 6";
        assert_finding(said, Kind::Race, 9, message);
    }

    #[test]
    fn an_overrun_has_a_size_and_a_block() {
        let said = "==1==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x1 at pc 0x2\n\
            READ of size 4 at 0x1 thread T0\n    #0 0x1 in f /r/a.metal:8\n\n\
            0x1 is located 0 bytes after 64-byte region [0x3,0x4)\n";
        let message = "heap-buffer-overflow, read of size 4, 0 bytes after 64-byte region";
        assert_finding(said, Kind::Address, 8, message);
    }

    #[test]
    fn undefined_operations_are_told_apart_from_overruns() {
        let said = "a.metal:6:2: runtime error: shift exponent 32 is too large\n";
        assert_finding(said, Kind::Undefined, 6, "shift exponent 32 is too large");
        let said = "a.metal:6:2: runtime error: index 4 out of bounds for type 'float[4]'\n";
        assert_finding(said, Kind::Address, 6, "index 4 out of bounds for type 'float[4]'");
        let said =
            "lib.h:6:2: runtime error: no\n    #0 0x1 in f lib.h:6\n    #1 0x2 in k /r/a.metal:7\n";
        assert_finding(said, Kind::Undefined, 7, "no");
    }

    #[test]
    fn a_runner_that_fails_blames_no_kernel() {
        assert!(matches!(of("runner: the job is cut short"), Error::Machine { .. }));
    }
}

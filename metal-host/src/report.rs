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

    /// `0 12`, an output and a byte of it; before it MemorySanitizer told which store the byte came from.
    fn output(&self, source: &Source, at: &str) -> Option<Found> {
        let (output, byte) = at.split_once(' ')?;
        let output = source.outputs.get(output.parse::<usize>().ok()?)?;
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

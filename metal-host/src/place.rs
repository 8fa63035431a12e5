//! Lines of a kernel's text, found in what compilers and sanitizers write.

pub(crate) use crate::error::Place;
use crate::source::Source;

/// The files that `source` says its text is from, with where its own name stands for those.
pub(crate) fn files(source: &Source) -> Vec<String> {
    let lines = source.header.lines().chain(source.body.lines());
    let mut files: Vec<_> = lines.filter_map(directive).map(|place| place.file).collect();
    files.push(source.name.clone());
    files.dedup();
    files
}

/// The line at which the body starts.
pub(crate) fn of_body(source: &Source) -> Place {
    let first = source.body.lines().find(|line| !line.trim().is_empty());
    let directive = first.and_then(directive);
    directive.unwrap_or_else(|| Place { file: source.name.clone(), line: 1 })
}

/// `#line 12 "path.metal"`.
pub(crate) fn directive(line: &str) -> Option<Place> {
    let (number, file) = line.trim().strip_prefix("#line ")?.split_once(' ')?;
    let file = file.trim().strip_prefix('"')?.strip_suffix('"')?;
    Some(Place { file: file.to_owned(), line: number.parse().ok()? })
}

/// The first place in the kernel's own text among what clang says.
pub(crate) fn of_diagnostics<'a>(
    mut lines: impl Iterator<Item = &'a str>,
    files: &[String],
) -> Option<Place> {
    lines.find_map(|line| of_diagnostic(line).filter(|place| files.contains(&place.file)))
}

/// `path:12:5: error: ...`, as clang and UndefinedBehaviorSanitizer write it.
pub(crate) fn of_diagnostic(line: &str) -> Option<Place> {
    let (file, rest) = line.split_once(':')?;
    let (number, _) = rest.split_once(':')?;
    Some(Place { file: file.to_owned(), line: number.parse().ok()? })
}

/// The first frame of a sanitizer's stack that lies in the kernel's own text.
///
/// A frame is `    #1 0x55… in function path:12:5 (module+0x…)`, its path with or without the folder it was
/// compiled in, its column left out by addr2line.
pub(crate) fn of_frames<'a>(
    lines: impl Iterator<Item = &'a str>,
    files: &[String],
) -> Option<Place> {
    let frames = lines.filter(|line| line.trim_start().starts_with('#'));
    frames.into_iter().find_map(|frame| {
        frame.split_whitespace().find_map(|word| {
            let mut parts = word.split(':');
            let (path, line) = (parts.next()?, parts.next()?);
            let line = line.parse().ok()?;
            let file = files.iter().find(|file| is_file(path, file))?;
            Some(Place { file: file.clone(), line })
        })
    })
}

fn is_file(path: &str, file: &str) -> bool {
    path.strip_suffix(file).is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(file: &str, line: u32) -> Option<Place> {
        Some(Place { file: file.to_owned(), line })
    }

    #[test]
    fn directives_name_the_files_and_the_body() {
        let source = Source {
            name: "k".into(),
            header: "// target\n#line 1 \"a.metal\"\nint f();\n".into(),
            body: "\n#line 7 \"b.metal\"\ny[0] = 1;".into(),
            ..Source::default()
        };
        assert_eq!(files(&source), ["a.metal", "b.metal", "k"]);
        assert_eq!(Some(of_body(&source)), place("b.metal", 7));
        assert_eq!(Some(of_body(&Source { body: "y[0] = 1;".into(), ..source })), place("k", 1));
    }

    #[test]
    fn the_first_frame_in_the_kernel_counts() {
        let files = ["metal/a.metal".to_owned()];
        let of = |text: &str| of_frames(text.lines(), &files);
        assert_eq!(
            of("  #0 0x1 in f /lib/simd.h:3:4\n  #1 0x2 in k /r/metal/a.metal:12:5 (k.so+0x1)"),
            place("metal/a.metal", 12)
        );
        assert_eq!(of("  #0 0x1 in f(int, float) metal/a.metal:9"), place("metal/a.metal", 9));
        assert_eq!(of("  #0 0x1 in f /r/notmetal/a.metal:9"), None);
        assert_eq!(of("see metal/a.metal:9"), None);
    }

    #[test]
    fn the_first_diagnostic_in_the_kernel_counts() {
        let files = ["a.metal".to_owned()];
        let said = "/lib/vector.h:48:17: error: no\na.metal:9:8: note: asked for here\na.metal:10:1: note: more";
        assert_eq!(of_diagnostics(said.lines(), &files), place("a.metal", 9));
        assert_eq!(of_diagnostics(["1 error generated."].into_iter(), &files), None);
    }
}

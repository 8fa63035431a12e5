//! The invariants of ARCHITECTURE.md, read off the source.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

/// One source file: its path below `src/` and its lines of code, comments left out.
struct Source {
    path: String,
    lines: Vec<(usize, String)>,
    length: usize,
}

impl Source {
    fn read(root: &Path, path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().enumerate().map(|(index, line)| (index + 1, code_of(line)));
        Self {
            path: path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/"),
            lines: lines.filter(|(_, line)| !line.is_empty()).collect(),
            length: text.lines().count(),
        }
    }

    /// The first folder or file below `src/`: `norm` for `norm/rms_norm/mod.rs`.
    fn top(&self) -> &str {
        self.path.split('/').next().unwrap().trim_end_matches(".rs")
    }

    /// Everything before the unit tests, which may evaluate what the library may not; nothing of a file of tests.
    fn library_lines(&self) -> impl Iterator<Item = &(usize, String)> {
        let tests = self.path.ends_with("/tests.rs");
        self.lines.iter().take_while(move |(_, line)| !tests && line != "#[cfg(test)]")
    }

    fn uses(&self, word: &str) -> impl Iterator<Item = String> {
        let hits = self.library_lines().filter(move |(_, line)| line.contains(word));
        hits.map(|(number, line)| format!("src/{}:{number}: {line}", self.path))
    }
}

fn code_of(line: &str) -> String {
    let code = line.split("//").next().unwrap_or_default();
    code.trim().to_owned()
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, "rs", &mut files);
    files.sort();
    files.into_iter().map(|path| Source::read(&root, path)).collect()
}

fn collect(folder: &Path, ending: &str, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, ending, files);
        } else if path.extension().is_some_and(|extension| extension == ending) {
            files.push(path);
        }
    }
}

/// Every use of one of `words` outside the top-level modules or files in `allowed`.
fn strays(words: &[&str], allowed: &[&str]) -> Vec<String> {
    let files = sources();
    let outside = files.iter().filter(|source| {
        !allowed.contains(&source.top()) && !allowed.contains(&source.path.as_str())
    });
    outside.flat_map(|source| words.iter().flat_map(|word| source.uses(word))).collect()
}

fn assert_none(strays: Vec<String>, rule: &str) {
    assert!(strays.is_empty(), "{rule}:\n{}", strays.join("\n"));
}

/// The order of the `mod` lines in lib.rs, which is the order of dependency.
fn module_order() -> HashMap<String, usize> {
    let files = sources();
    let library = files.iter().find(|source| source.path == "lib.rs").unwrap();
    let names = library.lines.iter().filter_map(|(_, line)| {
        let line = line.strip_prefix("pub ").unwrap_or(line);
        Some(line.strip_prefix("mod ")?.trim_end_matches(';').to_owned())
    });
    names.enumerate().map(|(rank, name)| (name, rank)).collect()
}

/// The top-level modules named after `crate::` in a line, brace groups included.
fn imports(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for rest in line.split("crate::").skip(1) {
        let path = rest.trim_start_matches('{');
        found.extend(path.split(|c: char| !(c.is_alphanumeric() || c == '_')).next());
    }
    found
}

/// Code with every `use crate::{a::…, b::…}` spread over lines joined into one.
fn statements(source: &Source) -> String {
    source.library_lines().map(|(_, line)| line.as_str()).collect::<Vec<_>>().join(" ")
}

/// `use crate::{check::Check, error::Result}` as `crate::check crate::error`.
fn spread_groups(code: &str) -> String {
    let mut spread = String::from(code);
    while let Some(start) = spread.find("crate::{") {
        let body_start = start + "crate::{".len();
        let mut depth = 1;
        let body: String = spread[body_start..]
            .chars()
            .take_while(|c| {
                depth += i32::from(*c == '{') - i32::from(*c == '}');
                depth > 0
            })
            .collect();
        let mut depth = 0;
        let names: Vec<_> = body
            .split(|c| {
                depth += i32::from(c == '{') - i32::from(c == '}');
                c == ',' && depth == 0
            })
            .map(|name| format!("crate::{}", name.trim()))
            .collect();
        spread.replace_range(start..body_start + body.len() + 1, &names.join(" "));
    }
    spread
}

#[test]
fn imports_point_one_way() {
    let order = module_order();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.path != "lib.rs") {
        let code = spread_groups(&statements(source));
        let own =
            order.get(source.top()).unwrap_or_else(|| panic!("{} is not in lib.rs", source.path));
        for name in imports(&code) {
            if order.get(name).is_some_and(|rank| rank > own) {
                wrong.push(format!("src/{} uses crate::{name}", source.path));
            }
        }
    }
    assert_none(wrong, "a module may use only those above it in lib.rs");
}

#[test]
fn grouped_imports_are_seen() {
    let code = "use crate::{ check::{Check, axes}, error::Result, }; crate::layout::Layout";
    let spread = spread_groups(code);
    assert_eq!(imports(&spread), ["check", "error", "", "layout"]);
}

#[test]
fn unsafe_code_has_two_homes_and_makes_one_promise() {
    assert!(!strays(&["unsafe "], &[]).is_empty(), "the search finds what there is");
    let homes = ["ffi", "kernel", "generation/reader.rs"];
    assert_none(strays(&["unsafe "], &homes), "unsafe only in ffi/ and kernel/");
    // Whose pools are nobody else's, only their owner can promise.
    let promises = strays(&["unsafe "], &["ffi", "kernel"]);
    assert_eq!(promises.len(), 1, "{promises:?}");
    assert!(promises[0].contains("Sole::promise()"), "{promises:?}");
}

#[test]
fn metal_is_a_matter_of_the_kernel_layer() {
    let words = ["feature = \"metal\"", "MetalKernel"];
    assert_none(strays(&words, &["kernel"]), "cfg(feature = \"metal\") only in kernel/");
}

#[test]
fn kernel_text_lives_in_metal() {
    let words = ["kernel void", "thread_position_in", "threadgroup_barrier"];
    assert_none(strays(&words, &[]), "no MSL in Rust");
}

#[test]
fn the_environment_is_read_in_one_place() {
    assert_none(strays(&["env::", "std::env"], &["config"]), "std::env only in config/");
}

#[test]
fn operations_stay_lazy() {
    let words = [".eval()", "eval(", "item(", "item_exact", "item_cast", "as_slice", "to_vec_"];
    let allowed = ["ffi", "config/precision.rs", "generation", "layers/prepared.rs"];
    assert_none(strays(&words, &allowed), "no evaluation and no host read inside an operation");
}

#[test]
fn refusals_are_worded_in_one_place() {
    let words = ["Error::Shape", "Error::Dtype", "Error::Value"];
    assert_none(strays(&words, &["check", "error"]), "only check.rs words an error");
}

#[test]
fn files_stay_short() {
    let long = sources().into_iter().filter(|source| source.length > 600);
    let names = long.map(|source| format!("src/{}: {} lines", source.path, source.length));
    assert_none(names.collect(), "no file above 600 lines");
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    assert!(text.lines().count() <= 150, "ARCHITECTURE.md has {} lines", text.lines().count());
}

//! The text of a kernel, as each device's compiler gets it.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::{BODY_MARK, Kernel};
use crate::target::Target;

/// A file of the `metal` folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File {
    /// Its path below `metal/`, which compilers name in their messages.
    pub path: &'static str,
    /// What it holds.
    pub text: &'static str,
    /// Known from the start, for every call asks for it.
    pub(super) has_large_array: bool,
}

/// The file at this path below `metal/`.
macro_rules! metal {
    ($path:literal) => {
        $crate::kernel::File::new(
            $path,
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/metal/", $path)),
        )
    };
}
pub(crate) use metal;

const METAL: File = metal!("targets/metal.h");
const CUDA: File = metal!("targets/cuda.h");

impl File {
    /// A text, and the path that compilers name in their messages.
    pub const fn new(path: &'static str, text: &'static str) -> Self {
        let has_large_array = contains(text.as_bytes(), b"LARGE_THREADGROUP_ARRAY(");
        Self { path, text, has_large_array }
    }

    /// The text from `line` on, such that compilers count lines as the file does; without comments and indentation, for
    /// where it is handed over as it is, MLX copies it at every call.
    fn numbered(text: &str, path: &str, line: usize) -> String {
        let bare = text.lines().map(|line| without_comment(line).trim().to_owned() + "\n");
        format!("\n#line {line} \"{path}\"\n{}", bare.collect::<String>())
    }

    fn whole(&self) -> String {
        Self::numbered(self.text, self.path, 1)
    }
}

impl Kernel {
    /// Everything before the function: what the device needs, the fragments, then the file's own helpers.
    pub fn header(&self, target: Target) -> String {
        let words = if target == Target::Cuda { CUDA } else { METAL };
        let shared = [words].iter().chain(self.fragments).map(File::whole).collect::<String>();
        let (helpers, _) = self.parts();
        shared + &File::numbered(helpers, self.file.path, 1)
    }

    /// The statements of the function; the whole file where it has no mark.
    pub fn body(&self) -> String {
        let (helpers, body) = self.parts();
        File::numbered(body, self.file.path, 1 + helpers.lines().count())
    }

    /// The name for MLX: another for another text, which may be on disk alone, where MLX does not look.
    pub(super) fn unique_name(&self, target: Target) -> String {
        let mut hasher = DefaultHasher::new();
        (self.header(target), self.body()).hash(&mut hasher);
        format!("{}_{:016x}", self.name, hasher.finish())
    }

    /// The helpers, and the body with the mark as its first line.
    fn parts(&self) -> (&'static str, &'static str) {
        match self.file.text.find(BODY_MARK) {
            Some(mark) => self.file.text.split_at(mark),
            None => ("", self.file.text),
        }
    }
}

/// A line up to its comment, but for one in which slashes may mean something else.
fn without_comment(line: &str) -> &str {
    let plain = !["/*", "*/", "\""].iter().any(|mark| line.contains(mark));
    line.split("//").next().filter(|_| plain).unwrap_or(line)
}

/// What `str::contains` tells, for constants.
const fn contains(text: &[u8], word: &[u8]) -> bool {
    let mut rest = text;
    while rest.len() >= word.len() {
        if begins_with(rest, word) {
            return true;
        }
        rest = rest.split_at(1).1;
    }
    false
}

const fn begins_with(text: &[u8], word: &[u8]) -> bool {
    let mut at = 0;
    while at < word.len() && text[at] == word[at] {
        at += 1;
    }
    at == word.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOUBLE: Kernel = Kernel {
        name: "double",
        inputs: &[],
        outputs: &[],
        constants: &[],
        fragments: &[File::new("common/two.metal", "// fragment\n")],
        file: File::new(
            "double.metal",
            "// helpers\nint two; // 2\n// ---- body ----\n  y[i] = twice(x[i]);\n",
        ),
    };

    #[test]
    fn the_mark_parts_helpers_from_body() {
        let header = DOUBLE.header(Target::Metal);
        assert!(header.contains("THREADGROUP_ARRAY"));
        assert!(header.ends_with(
            "\n#line 1 \"common/two.metal\"\n\n\n#line 1 \"double.metal\"\n\nint two;\n"
        ));
        let body = "\n#line 3 \"double.metal\"\n\ny[i] = twice(x[i]);\n";
        assert_eq!(DOUBLE.body(), body);
    }

    #[test]
    fn slashes_that_begin_no_comment_stay() {
        for (line, expected) in [
            ("int x;  // one", "int x;  "),
            ("// all", ""),
            ("/* see http://a.b */ int y;", "/* see http://a.b */ int y;"),
            ("see http://a.b */ int y;", "see http://a.b */ int y;"),
            ("#include \"a//b\"", "#include \"a//b\""),
        ] {
            assert_eq!(without_comment(line), expected);
        }
    }

    #[test]
    fn a_large_array_is_seen_wherever_it_stands() {
        for (text, expected) in [
            ("LARGE_THREADGROUP_ARRAY(T, x, [1]);", true),
            ("a\n  LARGE_THREADGROUP_ARRAY(", true),
            ("THREADGROUP_ARRAY(T, x, [1]); LARGE_THREADGROUP_ARRAY", false),
            ("", false),
        ] {
            assert_eq!(File::new("x.metal", text).has_large_array, expected, "{text}");
        }
    }

    #[test]
    fn a_file_without_the_mark_is_all_body() {
        let bare = Kernel { file: File::new("bare.metal", "y[i] = x[i];"), ..DOUBLE };
        assert_eq!(bare.body(), "\n#line 1 \"bare.metal\"\ny[i] = x[i];\n");
    }

    #[test]
    fn another_text_has_another_name() {
        let other = Kernel { file: File::new("double.metal", "y[i] = x[i];"), ..DOUBLE };
        let name = DOUBLE.unique_name(Target::Cuda);
        assert!(name.starts_with("double_"));
        assert_eq!(name, DOUBLE.unique_name(Target::Cuda));
        assert_ne!(name, other.unique_name(Target::Cuda));
        assert_ne!(name, DOUBLE.unique_name(Target::Metal));
    }
}

//! The text of a kernel for NVIDIA's GPUs by name: MLX copies and hashes what it is given at every call.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::fd::AsRawFd,
};

/// A kernel's text as lines that include it from open files.
pub(super) struct Included {
    header: TextFile,
    body: TextFile,
}

impl Included {
    /// None where the compiler could not read such files.
    pub(super) fn new(header: &str, body: &str, inputs: &[&str]) -> Option<Self> {
        // MLX passes what of an input's geometry it finds the name of.
        let geometry = inputs.iter().flat_map(|name| GEOMETRY.map(|part| format!("{name}_{part}")));
        let named = geometry.filter(|name| body.contains(name)).collect::<Vec<_>>().join(" ");
        let header = TextFile::new(header, "").ok()??;
        let body = TextFile::new(body, &format!("// {named}")).ok()??;
        Some(Self { header, body })
    }

    /// Header and body.
    pub(super) fn lines(&self) -> (&str, &str) {
        (&self.header.line, &self.body.line)
    }
}

const GEOMETRY: [&str; 3] = ["shape", "strides", "ndim"];

/// A text in a file that has no name, and that is gone with the process.
struct TextFile {
    line: String,
    _file: File,
}

impl TextFile {
    fn new(text: &str, before: &str) -> io::Result<Option<Self>> {
        let mut file = tempfile::tempfile()?;
        file.write_all(text.as_bytes())?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let line = format!("{before}\n#include \"{path}\"\n");
        let reads = fs::read_to_string(path)? == text;
        Ok(reads.then_some(Self { line, _file: file }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "an unwrap is an assertion")]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_included_from_files_and_names_the_geometry_it_reads() {
        let body = "y[0] = x[x_strides[1]];";
        let included = Included::new("int helper();", body, &["x", "w"]).unwrap();
        let (header_line, body_lines) = included.lines();
        let (before, line) = body_lines.split_once('\n').unwrap();
        assert_eq!(before, "// x_strides");
        let path = |line: &str| line.split('"').nth(1).unwrap().to_owned();
        assert_eq!(fs::read_to_string(path(line)).unwrap(), body);
        assert_eq!(fs::read_to_string(path(header_line)).unwrap(), "int helper();");
        assert!(header_line.starts_with("\n#include"));
    }
}

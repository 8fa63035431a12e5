//! Kernels as data: what an operation's own MSL text is, and how it is launched.
//!
//! A kernel is one file in `metal/`: a header of helpers, the line [`BODY_MARK`], and a body, which is
//! what MLX wraps into a function of its own. Beside its operation stands one [`Kernel`] that names the
//! text and its arguments; a pure function of the problem plans a [`Launch`]. No operation has a kernel
//! yet, and [`CATALOG`] is empty: this is the vocabulary they will be written in.

mod launch;

pub use launch::Launch;

/// The line between the helpers and the body of a kernel file.
pub const BODY_MARK: &str = "// ---- body ----";

/// Every kernel of the crate.
pub static CATALOG: &[&Kernel] = &[];

/// One launchable kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// The name of the function that MLX compiles; unique in [`CATALOG`].
    pub name: &'static str,
    /// The names of the input arrays, in order.
    pub inputs: &'static [&'static str],
    /// The names of the output arrays, in order.
    pub outputs: &'static [&'static str],
    /// The texts shared with other kernels, which go before its own helpers.
    pub fragments: &'static [&'static str],
    /// The kernel's own file.
    pub source: &'static str,
}

impl Kernel {
    /// Everything before the body: the fragments, then the file's own helpers.
    pub fn header(&self) -> String {
        let helpers = self.source.split_once(BODY_MARK).map_or("", |(helpers, _)| helpers);
        self.fragments.iter().copied().chain([helpers]).collect::<Vec<_>>().join("\n")
    }

    /// The statements of the function; the whole file where it has no mark.
    pub fn body(&self) -> &'static str {
        self.source.split_once(BODY_MARK).map_or(self.source, |(_, body)| body).trim_start()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOUBLE: Kernel = Kernel {
        name: "double",
        inputs: &["x"],
        outputs: &["y"],
        fragments: &["// fragment"],
        source: "// helpers\n// ---- body ----\ny[i] = twice(x[i]);\n",
    };

    #[test]
    fn the_mark_parts_helpers_from_body() {
        assert_eq!(DOUBLE.header(), "// fragment\n// helpers\n");
        assert_eq!(DOUBLE.body(), "y[i] = twice(x[i]);\n");
    }

    #[test]
    fn a_file_without_the_mark_is_all_body() {
        let bare = Kernel { source: "y[i] = x[i];", fragments: &[], ..DOUBLE };
        assert_eq!((bare.header().as_str(), bare.body()), ("", "y[i] = x[i];"));
    }

    #[test]
    fn names_in_the_catalog_are_unique() {
        let mut names: Vec<_> = CATALOG.iter().map(|kernel| kernel.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CATALOG.len());
    }
}

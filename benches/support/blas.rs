//! The library behind matrix products, by the files a process has mapped.

/// The first file among `maps`, `/proc/self/maps`, whose name has `part`.
pub(crate) fn among<'a>(maps: &'a str, part: &str) -> Option<&'a str> {
    let mut files = maps.lines().filter_map(|line| Some(line.rsplit_once('/')?.1));
    files.find(|file| file.contains(part))
}

/// "OpenBLAS 0.3.21" for `libopenblasp-r0.3.21.so`, and what is not known as it stands.
pub(crate) fn sold_as(file: &str) -> String {
    let version = |mark: &str| {
        let (_, version) = file.split_once(mark)?;
        Some(version.trim_end_matches(".so").to_owned())
    };
    let known = if file.starts_with("libopenblas") {
        version("-r").map(|version| format!("OpenBLAS {version}"))
    } else if file.starts_with("libcublas") {
        version(".so.").map(|version| format!("cuBLAS {version}"))
    } else {
        None
    };
    known.unwrap_or_else(|| file.to_owned())
}

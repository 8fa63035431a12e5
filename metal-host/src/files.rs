//! The C++ that every kernel is compiled with: Metal's library for the host, and the runtime.

use std::{fs, io, path::Path};

macro_rules! files {
    ($($folder:literal: $($file:literal)*;)*) => {
        &[$($(($file, include_str!(concat!($folder, $file))),)*)*]
    };
}

/// Every file by its path below the include folder, which is flat but for `msl/`.
const FILES: &[(&str, &str)] = files! {
    "../../metal/targets/host/":
        "metal_stdlib" "metal_atomic" "metal_common" "metal_compute" "metal_geometric" "metal_integer"
        "metal_limits" "metal_math" "metal_numeric" "metal_relational" "metal_simdgroup"
        "metal_simdgroup_matrix" "metal_type_traits" "metal_types" "mlx_utils.h"
        "msl/language.h" "msl/traits.h" "msl/vector.h" "msl/construct.h" "msl/math.h" "msl/integer.h"
        "msl/simd.h" "msl/matrix.h" "msl/atomic.h";
    "../runtime/":
        "abi.h" "entry.h" "switch.h" "sanitizer.h" "report.h" "memory.h" "schedule.h" "group.h"
        "dispatch.h" "runner.cpp";
};

/// What the words of this project's kernels mean to Apple's compiler; goes at the start of a header.
pub const METAL_TARGET: &str = include_str!("../../metal/targets/metal.h");

/// Names and contents, for hashing.
pub(crate) fn parts<'a>() -> impl Iterator<Item = &'a str> {
    FILES.iter().flat_map(|&(name, text)| [name, text])
}

pub(crate) fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder.join("msl"))?;
    FILES.iter().try_for_each(|(name, text)| fs::write(folder.join(name), text))
}

/// FNV-1a in 128 bits: the same in every build of this crate, which std's hashers do not promise.
pub(crate) fn hash<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let bytes = parts.into_iter().flat_map(|part| part.bytes().chain([0]));
    let hash = bytes.fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    });
    format!("{hash:032x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_separates_its_parts() {
        assert_ne!(hash(["ab", "c"]), hash(["a", "bc"]));
        assert_eq!(hash([]), "6c62272e07bb014262b821756295c58d");
        assert_eq!(hash(["a"]).len(), 32);
    }
}

//! Bits that look random and depend on their seed alone.

/// 2^64 over the golden ratio, as in Steele et al., "Fast Splittable Pseudorandom Number
/// Generators", 2014, whose finalizer [`scramble`] is.
pub(crate) const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

pub(crate) fn scramble(state: u64) -> u64 {
    let z = state.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_published_generator() {
        // Its first output from state 0.
        assert_eq!(scramble(0), 0xE220_A839_7B1D_CDAF);
    }
}

//! Arithmetic of sizes, which MLX counts in i32.

/// How many parts of `size` hold `count`, of which there is none or more.
pub(crate) fn div_ceil(count: i32, size: i32) -> i32 {
    count / size + i32::from(count % size != 0)
}

/// The next multiple of `size`.
pub(crate) fn padded(count: i32, size: i32) -> i32 {
    div_ceil(count, size) * size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_counted_up() {
        let parts = [0, 1, 7, 8, 9, i32::MAX].map(|count| div_ceil(count, 8));
        assert_eq!(parts, [0, 1, 1, 1, 2, 1 << 28]);
        assert_eq!([0, 1, 8, 9].map(|count| padded(count, 8)), [0, 8, 8, 16]);
    }
}

//! The shapes that operations on the last axis are tested with.

/// Rows of one length.
pub(crate) struct Rows {
    pub(crate) name: &'static str,
    pub(crate) shape: &'static [i32],
    pub(crate) strided: bool,
}

const fn rows(name: &'static str, shape: &'static [i32]) -> Rows {
    Rows { name, shape, strided: false }
}

/// Every rank, and lengths around those at which kernels divide rows otherwise.
pub(crate) const ROWS: &[Rows] = &[
    rows("one element", &[1]),
    rows("one row", &[7]),
    rows("rows of one", &[5, 1]),
    rows("no rows", &[0, 8]),
    rows("rank 2", &[3, 8]),
    rows("rank 3", &[2, 3, 9]),
    rows("rank 5", &[2, 1, 3, 2, 63]),
    rows("64", &[4, 64]),
    rows("65", &[4, 65]),
    rows("1000", &[2, 1000]),
    rows("1023", &[2, 1023]),
    rows("1024", &[2, 1024]),
    rows("1025", &[2, 1025]),
    rows("4095", &[1, 4095]),
    rows("4097", &[1, 4097]),
    Rows { strided: true, ..rows("strided", &[3, 4, 65]) },
];

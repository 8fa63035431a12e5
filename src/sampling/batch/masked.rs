//! Logits without what masks forbid.

use mlx_rs::{
    Array, Dtype,
    ops::{indexing::TryIndexOp, select},
};

use crate::{error::Result, sampling::TokenMask, uploads};

/// The logits of all rows, −∞ where a row's mask forbids a token.
#[derive(Debug)]
pub(super) struct Masked {
    /// Which rows have a mask.
    rows: Vec<bool>,
    /// The same, `[N]`.
    pub(super) marks: Array,
    /// `[N, V]`, of the type that they had.
    pub(super) logits: Array,
}

impl Masked {
    /// None where no row has a mask.
    pub(super) fn of(logits: &Array, masks: &[Option<&TokenMask>]) -> Result<Option<Self>> {
        let rows: Vec<_> = masks.iter().map(Option::is_some).collect();
        if !rows.contains(&true) {
            return Ok(None);
        }
        let none = uploads::float(f32::NEG_INFINITY).as_dtype(logits.dtype())?;
        let logits = select(open(masks, logits.dim(-1))?, logits, none)?;
        let marks = Array::from_slice(&rows, &[rows.len() as i32]);
        Ok(Some(Self { rows, marks, logits }))
    }

    /// Whether this row has a mask.
    pub(super) fn is_of(&self, row: i32) -> bool {
        self.rows.get(row.unsigned_abs() as usize) == Some(&true)
    }
}

/// What each row may draw, `[N, V]`, bool. Only masks that there are go to the device, and one of everything.
fn open(masks: &[Option<&TokenMask>], vocabulary: i32) -> Result<Array> {
    let some: Vec<_> = masks.iter().flatten().collect();
    let width = vocabulary.unsigned_abs().div_ceil(32) as usize * 4;
    let mut bytes: Vec<_> = some.iter().flat_map(|mask| mask.bytes()).collect();
    bytes.resize(bytes.len() + width, u8::MAX);
    let bytes = Array::from_slice(&bytes, &[some.len() as i32 + 1, width as i32]);
    let mut taken = 0..;
    let place = |mask: &Option<&TokenMask>| match mask {
        Some(_) => taken.next().unwrap_or_default(),
        None => some.len() as i32,
    };
    let places: Vec<_> = masks.iter().map(place).collect();
    let rows = bytes.take_axis(Array::from_slice(&places, &[places.len() as i32]), 0)?;
    let open = eights()?.take_axis(rows, 0)?.reshape(&[places.len() as i32, -1])?;
    Ok(open.try_index((.., ..vocabulary))?)
}

/// The eight bits of each byte, `[256, 8]`, bool: to look a byte up is one op, and MLX's shifts are not in mlx-rs.
fn eights() -> Result<Array> {
    let bits = (0..256).flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1));
    Ok(uploads::integers(bits.collect()).reshape(&[256, 8])?.as_dtype(Dtype::Bool)?)
}

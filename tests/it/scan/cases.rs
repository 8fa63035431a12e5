//! The problems that every scan is put to.

use mlx_primitives::{Dispatch, scan::ScanOptions};
use mlx_rs::{Array, Dtype};

use super::oracle::Ask;
use crate::support::sample::{normal, strided};

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) shape: &'static [i32],
    pub(super) ask: Ask<'static>,
    pub(super) stateful: bool,
    pub(super) strided: bool,
}

const fn case(name: &'static str, shape: &'static [i32], axis: usize) -> Case {
    Case { name, shape, ask: Ask::along(axis), stateful: false, strided: false }
}

impl Case {
    const fn exclusive(mut self) -> Self {
        self.ask.exclusive = true;
        self
    }

    const fn reverse(mut self) -> Self {
        self.ask.reverse = true;
        self
    }

    const fn stateful(mut self) -> Self {
        self.stateful = true;
        self
    }

    const fn segments(mut self, segments: &'static [i32]) -> Self {
        self.ask.segments = Some(segments);
        self
    }

    const fn strided(mut self) -> Self {
        self.strided = true;
        self
    }

    pub(super) fn x(&self, dtype: Dtype) -> Array {
        let x = normal(1, self.shape, dtype);
        if self.strided { strided(&x) } else { x }
    }

    pub(super) fn state(&self) -> Option<Array> {
        let shape = self.shape.iter().map(|&size| size as usize).collect::<Vec<_>>();
        let shape = self.ask.state_shape(&shape);
        let shape = shape.iter().map(|&size| size as i32).collect::<Vec<_>>();
        self.stateful.then(|| normal(2, &shape, Dtype::Float32))
    }

    pub(super) fn options<'a>(
        &self,
        state: Option<&'a Array>,
        dispatch: Dispatch,
    ) -> ScanOptions<'a> {
        ScanOptions {
            // From the end, as often as not.
            axis: self.ask.axis as i32 - if self.strided { 0 } else { self.shape.len() as i32 },
            exclusive: self.ask.exclusive,
            reverse: self.ask.reverse,
            initial_state: state,
            segments: self.ask.segments,
            dispatch,
        }
    }
}

/// Any axis and rank, lengths around those where implementations change their way, and every option.
pub(super) const CASES: &[Case] = &[
    case("one element", &[1], 0),
    case("one step", &[3, 1, 5], 1),
    case("a row", &[7], 0).stateful(),
    case("rows", &[3, 5], 1).exclusive(),
    case("rows backwards", &[3, 33], 1).reverse().stateful(),
    case("rows backwards, exclusive", &[2, 9], 1).reverse().exclusive().stateful(),
    case("columns", &[9, 3], 0).stateful(),
    case("a sequence", &[2, 9, 3], 1),
    case("a sequence backwards", &[2, 37, 17], 1).reverse().strided(),
    case("a sequence, all options", &[2, 8, 6], 1).reverse().exclusive().stateful().strided(),
    case("the first of four axes", &[4, 3, 2, 5], 0).exclusive(),
    case("the third of four axes", &[2, 3, 7, 5], 2).stateful().strided(),
    case("long rows", &[2, 1031], 1).stateful(),
    case("long rows backwards", &[2, 1100], 1).reverse().exclusive(),
    case("long columns", &[521, 2], 0).stateful().strided(),
    case("longest columns", &[1, 2100, 3], 1).reverse().stateful(),
    case("many channels", &[300, 67], 0).reverse(),
    case("channels in pairs", &[128, 9, 128], 1).stateful(),
    case("channels in pairs backwards", &[128, 19, 66], 1).reverse().exclusive().strided(),
    case("segments", &[2, 9, 3], 1).segments(&[0, 4, 9]),
    case("segments with states", &[2, 9, 3], 1).segments(&[0, 4, 4, 9]).stateful(),
    case("segments backwards", &[3, 40], 1).segments(&[0, 0, 13, 40, 40]).reverse().stateful(),
    case("segments, exclusive", &[40, 3], 0).segments(&[0, 1, 2, 39, 40]).exclusive().stateful(),
    case("long segments", &[1, 601, 3], 1).segments(&[0, 200, 601]).reverse().exclusive(),
    case("segments in pieces", &[1, 2100, 3], 1).segments(&[0, 700, 700, 1400, 2100]).stateful(),
    case("segments of rows in pieces", &[1, 2100], 1).segments(&[0, 5, 1300, 2100]).reverse(),
    case("one segment", &[5, 2], 0).segments(&[0, 5]).stateful(),
];

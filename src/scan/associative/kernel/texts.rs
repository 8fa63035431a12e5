//! The kernels, and their calls.

use mlx_rs::{Array, Dtype};

use super::{super::rule::Rule, geometry::Geometry};
use crate::{
    error::Result,
    ffi::exactly,
    kernel::{Argument, Constant, File, Kernel, Plan, metal},
    scan::ScanOperator,
};

/// The kernels of these operations.
pub(crate) const KERNELS: &[&Kernel] =
    &[&COLUMNS, &ROWS, &COLUMNS_TOTALS, &ROWS_TOTALS, &COLUMNS_BACKWARD, &ROWS_BACKWARD];

const OF_COLUMNS: &[File] =
    &[metal!("common/chunk.metal"), metal!("common/scan.metal"), metal!("common/columns.metal")];
const OF_ROWS: &[File] =
    &[metal!("common/chunk.metal"), metal!("common/scan.metal"), metal!("common/runs.metal")];

static COLUMNS: Kernel = Kernel {
    name: "scan_columns",
    inputs: &[
        Argument::of("A", "decay", &["O", "L", "I"]).strided(),
        Argument::of("T", "x", &["O", "L", "I"]),
        Argument::fixed(Dtype::Float32, "state", &["O", "P", "I"]).strided(),
        Argument::fixed(Dtype::Int32, "bounds", &["Q"]),
    ],
    outputs: &[
        Argument::of("T", "y", &["O", "L", "I"]),
        Argument::fixed(Dtype::Float32, "last", &["O", "P", "I"]),
    ],
    constants: &["RULE", "EXCLUSIVE", "REVERSE", "SIMDS", "WIDTH", "STEPS", "AHEAD"],
    fragments: OF_COLUMNS,
    file: metal!("scan/scan_columns.metal"),
};

static ROWS: Kernel = Kernel {
    name: "scan_rows",
    inputs: &[
        Argument::of("A", "decay", &["O", "L"]).strided(),
        Argument::of("T", "x", &["O", "L"]),
        Argument::fixed(Dtype::Float32, "state", &["O", "P"]).strided(),
        Argument::fixed(Dtype::Int32, "bounds", &["Q"]),
    ],
    outputs: &[
        Argument::of("T", "y", &["O", "L"]),
        Argument::fixed(Dtype::Float32, "last", &["O", "P"]),
    ],
    constants: &["RULE", "EXCLUSIVE", "REVERSE", "SIMDS", "CHUNKS"],
    fragments: OF_ROWS,
    file: metal!("scan/scan_rows.metal"),
};

static COLUMNS_TOTALS: Kernel = Kernel {
    name: "scan_columns_totals",
    inputs: &[
        Argument::of("A", "decay", &["O", "L", "I"]).strided(),
        Argument::of("T", "x", &["O", "L", "I"]),
        Argument::fixed(Dtype::Int32, "bounds", &["Q"]),
    ],
    outputs: &[
        Argument::fixed(Dtype::Float32, "decays", &["O", "P", "I"]),
        Argument::fixed(Dtype::Float32, "values", &["O", "P", "I"]),
    ],
    constants: &["RULE", "SCALED", "REVERSE", "SIMDS", "WIDTH", "STEPS"],
    fragments: OF_COLUMNS,
    file: metal!("scan/scan_columns_totals.metal"),
};

static ROWS_TOTALS: Kernel = Kernel {
    name: "scan_rows_totals",
    inputs: &[
        Argument::of("A", "decay", &["O", "L"]).strided(),
        Argument::of("T", "x", &["O", "L"]),
        Argument::fixed(Dtype::Int32, "bounds", &["Q"]),
    ],
    outputs: &[
        Argument::fixed(Dtype::Float32, "decays", &["O", "P"]),
        Argument::fixed(Dtype::Float32, "values", &["O", "P"]),
    ],
    constants: &["RULE", "SCALED", "REVERSE"],
    fragments: OF_ROWS,
    file: metal!("scan/scan_rows_totals.metal"),
};

static COLUMNS_BACKWARD: Kernel = Kernel {
    name: "affine_columns_backward",
    inputs: &[
        Argument::of("A", "decay", &["O", "L", "I"]).strided(),
        Argument::of("T", "y", &["O", "L", "I"]),
        Argument::of("T", "dy", &["O", "L", "I"]),
        Argument::fixed(Dtype::Float32, "state", &["O", "P", "I"]).strided(),
        Argument::fixed(Dtype::Float32, "dlast", &["O", "P", "I"]),
        Argument::fixed(Dtype::Int32, "bounds", &["Q"]),
    ],
    outputs: &[
        Argument::of("T", "dx", &["O", "L", "I"]),
        Argument::of("A", "ddecay", &["O", "L", "I"]),
        Argument::fixed(Dtype::Float32, "dstate", &["O", "P", "I"]),
    ],
    constants: &["EXCLUSIVE", "REVERSE", "SIMDS", "WIDTH", "STEPS"],
    fragments: OF_COLUMNS,
    file: metal!("scan/affine_columns_backward.metal"),
};

static ROWS_BACKWARD: Kernel = Kernel {
    name: "affine_rows_backward",
    inputs: &[
        Argument::of("A", "decay", &["O", "L"]).strided(),
        Argument::of("T", "y", &["O", "L"]),
        Argument::of("T", "dy", &["O", "L"]),
        Argument::fixed(Dtype::Float32, "state", &["O", "P"]).strided(),
        Argument::fixed(Dtype::Float32, "dlast", &["O", "P"]),
        Argument::fixed(Dtype::Int32, "bounds", &["Q"]),
    ],
    outputs: &[
        Argument::of("T", "dx", &["O", "L"]),
        Argument::of("A", "ddecay", &["O", "L"]),
        Argument::fixed(Dtype::Float32, "dstate", &["O", "P"]),
    ],
    constants: &["EXCLUSIVE", "REVERSE", "SIMDS", "CHUNKS"],
    fragments: OF_ROWS,
    file: metal!("scan/affine_rows_backward.metal"),
};

/// Which way, and whether results leave out the element beside them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Direction {
    pub(super) exclusive: bool,
    pub(super) reverse: bool,
}

impl Direction {
    fn constants(self) -> [Constant; 2] {
        [Constant::Bool(self.exclusive), Constant::Bool(self.reverse)]
    }
}

/// The kernels for arrays of one shape, all `[O, L, I]` or `[O, P, I]` but for bounds.
pub(super) struct Texts {
    pub(super) geometry: Geometry,
}

impl Texts {
    pub(super) fn of(x: &Array) -> Self {
        Self { geometry: Geometry::of(x) }
    }

    /// Of decay, input, states and bounds: results and last states.
    pub(super) fn scan(
        &self,
        rule: Rule,
        direction: Direction,
        inputs: [&Array; 4],
    ) -> Result<[Array; 2]> {
        let (sizes, launch) = self.geometry.plan(pieces_of(inputs[3]));
        let constants = [number(rule)].into_iter().chain(direction.constants()).chain(sizes);
        let plan = Plan { constants: constants.collect(), extents: Vec::new(), launch };
        self.call(&ROWS, &COLUMNS, inputs, plan)
    }

    /// Of decay, input and bounds: the decays and values of pieces.
    pub(super) fn totals(
        &self,
        rule: Rule,
        reverse: bool,
        scaled: bool,
        inputs: [&Array; 3],
    ) -> Result<[Array; 2]> {
        let pieces = pieces_of(inputs[2]);
        let (sizes, launch) = self.geometry.plan_totals(pieces);
        let constants = [number(rule), Constant::Bool(scaled), Constant::Bool(reverse)];
        let constants = constants.into_iter().chain(sizes).collect();
        let plan = Plan { constants, extents: vec![("P", pieces)], launch };
        self.call(&ROWS_TOTALS, &COLUMNS_TOTALS, inputs, plan)
    }

    /// Of decay, results, gradient of results, states, gradient of last states and bounds: the gradients of input, decay
    /// and states.
    pub(super) fn affine_backward(
        &self,
        direction: Direction,
        inputs: [&Array; 6],
    ) -> Result<[Array; 3]> {
        let (sizes, launch) = self.geometry.plan_backward(pieces_of(inputs[5]));
        let constants = direction.constants().into_iter().chain(sizes).collect();
        let plan = Plan { constants, extents: Vec::new(), launch };
        self.call(&ROWS_BACKWARD, &COLUMNS_BACKWARD, inputs, plan)
    }

    fn call<const N: usize, const M: usize>(
        &self,
        of_rows: &'static Kernel,
        of_columns: &'static Kernel,
        inputs: [&Array; N],
        plan: Plan,
    ) -> Result<[Array; M]> {
        if !self.geometry.in_rows() {
            return of_columns.call(&inputs, plan);
        }
        let flat = |array: &&Array| match array.ndim() {
            3 => array.squeeze_axes(&[2]),
            _ => Ok((*array).clone()),
        };
        let flat = inputs.iter().map(flat).collect::<Result<Vec<_>, _>>()?;
        let outputs: [Array; M] = of_rows.call(&flat.iter().collect::<Vec<_>>(), plan)?;
        let outputs = outputs.into_iter().map(|array| array.expand_dims(2));
        Ok(exactly(outputs.collect::<Result<Vec<_>, _>>()?)?)
    }
}

fn pieces_of(bounds: &Array) -> i32 {
    bounds.dim(0) - 1
}

/// What `metal/common/scan.metal` calls a rule.
fn number(rule: Rule) -> Constant {
    Constant::Int(match rule {
        Rule::Affine => 0,
        Rule::Operator(ScanOperator::Add) => 1,
        Rule::Operator(ScanOperator::Mul) => 2,
        Rule::Operator(ScanOperator::Max) => 3,
        Rule::Operator(ScanOperator::Min) => 4,
        Rule::Operator(ScanOperator::LogAddExp) => 5,
    })
}

//! A kernel with its arrays, checked against what the kernel declares.

use std::collections::BTreeMap;

use mlx_rs::{Array, Dtype};

use super::{Argument, Element, Kernel, Launch, MAX_ELEMENTS, OutputSpec, Template};
use crate::{check::Check, error::Result, target::Target};

/// What a launch is besides its arrays.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The constants, in the order of [`Kernel::constants`].
    pub constants: Vec<Constant>,
    /// The letters that occur in the shapes of outputs alone.
    pub extents: Vec<(&'static str, i32)>,
    /// How many threads run it.
    pub launch: Launch,
}

/// A number that a kernel is compiled for, not below zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Constant {
    /// An `int`.
    Int(i32),
    /// A `bool`.
    Bool(bool),
    /// The bits of a `float`, as an `int`: MSL has no floating template parameters, so the text reads it by
    /// `as_type<float>`.
    Float(f32),
}

impl Constant {
    /// The template argument, unless its sign is set: MLX writes arguments into the name of the function, where a minus cannot be.
    fn template(self, check: Check, name: &'static str) -> Result<Template> {
        let number = match self {
            Self::Bool(value) => return Ok(Template::Bool(value)),
            Self::Int(value) => value,
            // Zero has a sign, which no kernel looks at.
            Self::Float(value) => (value + 0.0).to_bits().cast_signed(),
        };
        let expected = "be none below zero";
        check.value(number >= 0, name, expected, format_args!("{self:?}"))?;
        Ok(Template::Int(number))
    }
}

/// A launch with everything decided and checked.
#[derive(Debug)]
pub struct Call {
    kernel: &'static Kernel,
    inputs: Vec<Array>,
    outputs: Vec<OutputSpec>,
    template: Vec<(&'static str, Template)>,
    launch: Launch,
}

impl Call {
    /// Checks arrays and plan against what `kernel` declares. Nothing is compiled or launched.
    ///
    /// # Errors
    /// When the number of arrays or constants is another, when an array has another rank, another size along an axis,
    /// another type of elements, none or more than [`MAX_ELEMENTS`] of them, when a constant is below zero, or when not
    /// every GPU of the current stream's kind could run the launch.
    pub fn new(kernel: &'static Kernel, inputs: &[&Array], plan: Plan) -> Result<Self> {
        let check = Check::op(kernel.name);
        let count = |name, declared: usize, found: usize| {
            check.value(found == declared, name, format_args!("number {declared}"), found)
        };
        count("inputs", kernel.inputs.len(), inputs.len())?;
        count("constants", kernel.constants.len(), plan.constants.len())?;
        let most_bytes = kernel.most_threadgroup_bytes(Target::current()?);
        plan.launch.check_within(most_bytes, kernel.name)?;
        let inputs = kernel.inputs.iter().zip(inputs);
        let inputs = inputs.map(|(argument, x)| passed(kernel, argument, x));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let mut bound = Bound::new(check, plan.extents);
        for (argument, array) in kernel.inputs.iter().zip(&inputs) {
            bound.input(argument, array)?;
        }
        let outputs = kernel.outputs.iter().map(|output| bound.output(output));
        let outputs = outputs.collect::<Result<Vec<_>>>()?;
        let constants = kernel.constants.iter().copied().zip(plan.constants);
        let constants =
            constants.map(|(name, constant)| Ok((name, constant.template(check, name)?)));
        let constants = constants.collect::<Result<Vec<_>>>()?;
        let template = bound.template().chain(constants).collect();
        Ok(Self { kernel, inputs, outputs, template, launch: plan.launch })
    }

    /// The kernel.
    pub fn kernel(&self) -> &'static Kernel {
        self.kernel
    }

    /// The input arrays, none of them 0-d. A [`strided`](Argument::strided) one is read as it lies in memory.
    pub fn inputs(&self) -> &[Array] {
        &self.inputs
    }

    /// What the kernel will write.
    pub fn outputs(&self) -> &[OutputSpec] {
        &self.outputs
    }

    /// The template arguments: element types in the order in which arguments first name them, then constants.
    pub fn template(&self) -> &[(&'static str, Template)] {
        &self.template
    }

    /// How many threads run it.
    pub fn launch(&self) -> Launch {
        self.launch
    }
}

/// The array as it is handed over: never 0-d, and in rows where MLX does not see to that.
fn passed(kernel: &Kernel, argument: &Argument, array: &Array) -> Result<Array> {
    if array.ndim() == 0 {
        return Ok(array.reshape(&[1])?);
    }
    let as_it_lies =
        argument.strided || argument.written || kernel.takes_rows() || array.size() == 1;
    Ok(if as_it_lies { array.clone() } else { array.contiguous()? })
}

/// What the letters and element types of a kernel stand for in one call.
struct Bound {
    check: Check,
    extents: BTreeMap<&'static str, i32>,
    elements: Vec<(&'static str, Dtype)>,
}

impl Bound {
    fn new(check: Check, extents: Vec<(&'static str, i32)>) -> Self {
        Self { check, extents: extents.into_iter().collect(), elements: Vec::new() }
    }

    fn input(&mut self, argument: &Argument, array: &Array) -> Result<()> {
        let name = argument.name;
        match argument.element {
            Element::Is(dtype) => self.check.dtype_among(name, array, &[dtype]).map(drop)?,
            Element::Floating(letter) => match self.element(letter) {
                Some(dtype) => self.check.dtype_among(name, array, &[dtype]).map(drop)?,
                None => self.elements.push((letter, self.check.floating(name, array)?)),
            },
            Element::Any(letter) => match self.element(letter) {
                Some(dtype) => self.check.dtype_among(name, array, &[dtype]).map(drop)?,
                None => self.elements.push((letter, array.dtype())),
            },
        }
        let expected: Vec<_> = argument.shape.iter().map(|axis| self.axis(axis)).collect();
        self.check.shape(name, array, &expected)?;
        self.countable(name, array.shape())?;
        for (axis, &size) in argument.shape.iter().zip(array.shape()) {
            self.extents.entry(axis).or_insert(size);
        }
        Ok(())
    }

    fn output(&self, argument: &Argument) -> Result<OutputSpec> {
        let name = argument.name;
        let dtype = match argument.element {
            Element::Is(dtype) => Some(dtype),
            Element::Floating(letter) | Element::Any(letter) => self.element(letter),
        };
        let dtype = self.check.known(dtype, name, "have the dtype of an input", "none")?;
        let sizes = argument.shape.iter().map(|axis| {
            self.check.known(
                self.extent(axis),
                name,
                "have axes that inputs or the plan name",
                axis,
            )
        });
        let shape = sizes.collect::<Result<Vec<_>>>()?;
        self.countable(name, &shape)?;
        Ok(OutputSpec { shape, dtype })
    }

    fn template(&self) -> impl Iterator<Item = (&'static str, Template)> {
        self.elements.iter().map(|&(letter, dtype)| (letter, Template::Dtype(dtype)))
    }

    fn element(&self, letter: &str) -> Option<Dtype> {
        self.elements.iter().find(|(known, _)| *known == letter).map(|(_, dtype)| *dtype)
    }

    fn extent(&self, axis: &str) -> Option<i32> {
        axis.parse().ok().or_else(|| self.extents.get(axis).copied())
    }

    fn axis(&self, axis: &'static str) -> crate::check::Axis {
        self.extent(axis).map_or_else(|| axis.into(), Into::into)
    }

    fn countable(&self, name: &'static str, shape: &[i32]) -> Result<()> {
        let elements = shape
            .iter()
            .try_fold(1_usize, |product, &size| product.checked_mul(usize::try_from(size).ok()?));
        let fits = elements.is_some_and(|count| (1..=MAX_ELEMENTS).contains(&count));
        self.check.value(fits, name, "hold 1 to 2^31 elements", format_args!("{shape:?}"))
    }
}

#[cfg(test)]
mod tests;

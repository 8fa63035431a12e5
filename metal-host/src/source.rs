//! A kernel as MLX's `fast::metal_kernel` is told of it.

/// One kernel, its arrays and their shapes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Source {
    /// Its name, of which MLX makes the name of the function.
    pub name: String,
    /// The arrays it reads, in order.
    pub inputs: Vec<Input>,
    /// The arrays it writes, in order.
    pub outputs: Vec<Output>,
    /// The arguments of its template, in order.
    pub template: Vec<(String, Template)>,
    /// Helpers, which go before the function.
    ///
    /// Here and in the body, `#line N "path.metal"` says where the text comes from; findings name that place.
    pub header: String,
    /// The statements of the function.
    pub body: String,
    /// Whether outputs are declared `atomic<T>`.
    pub atomic_outputs: bool,
}

/// An array whose bytes a run returns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Returned<'a> {
    pub(crate) name: &'a str,
    pub(crate) element: Element,
    pub(crate) bytes: usize,
}

impl Source {
    /// The outputs, then the inputs that are written.
    pub(crate) fn returned(&self) -> impl Iterator<Item = Returned<'_>> {
        let outputs = self.outputs.iter().map(|Output { name, element, shape }| Returned {
            name,
            element: *element,
            bytes: bytes(*element, shape).unwrap_or_default(),
        });
        let written = self.inputs.iter().filter(|input| input.written).map(|input| Returned {
            name: &input.name,
            element: input.element,
            bytes: input.bytes().unwrap_or_default(),
        });
        outputs.chain(written)
    }
}

/// An array that a kernel reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Input {
    /// The name of its parameter.
    pub name: String,
    /// The type of its elements.
    pub element: Element,
    /// Its shape, which decides how it is passed: see [`Input::is_constant`].
    pub shape: Vec<usize>,
    /// How many elements lie between neighbours along each axis, where rows do not follow each other. MLX passes such an
    /// input only to a kernel without `ensure_row_contiguous`.
    pub strides: Option<Vec<usize>>,
    /// Whether the kernel writes some of its elements where they lie, which MLX does not know of.
    pub written: bool,
}

/// An array that a kernel writes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Output {
    /// The name of its parameter.
    pub name: String,
    /// The type of its elements.
    pub element: Element,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Input {
    /// An input called `name`.
    pub fn new(name: impl Into<String>, element: Element, shape: impl Into<Vec<usize>>) -> Self {
        Input { name: name.into(), element, shape: shape.into(), strides: None, written: false }
    }

    /// The same with these strides; its bytes are then all from its first element to its last.
    pub fn with_strides(self, strides: impl Into<Vec<usize>>) -> Self {
        Input { strides: Some(strides.into()), ..self }
    }

    /// The same as an array whose bytes a run returns too, after those of the outputs.
    pub fn written(self) -> Input {
        Input { written: true, ..self }
    }

    /// Whether MLX passes it in the address space `constant`: it has fewer than 8 elements.
    pub fn is_constant(&self) -> bool {
        self.shape.iter().product::<usize>() < 8
    }

    pub(crate) fn bytes(&self) -> Option<usize> {
        match &self.strides {
            Some(strides) if strides.len() != self.shape.len() => None,
            Some(_) if self.shape.contains(&0) => Some(0),
            Some(strides) => {
                let mut axes = self.shape.iter().zip(strides);
                let last = axes.try_fold(0_usize, |last, (&size, &stride)| {
                    last.checked_add(stride.checked_mul(size - 1)?)
                });
                last?.checked_add(1)?.checked_mul(self.element.bytes())
            }
            None => bytes(self.element, &self.shape),
        }
    }
}

impl Output {
    /// An output called `name`.
    pub fn new(name: impl Into<String>, element: Element, shape: impl Into<Vec<usize>>) -> Self {
        Output { name: name.into(), element, shape: shape.into() }
    }

    pub(crate) fn bytes(&self) -> Option<usize> {
        bytes(self.element, &self.shape)
    }
}

fn bytes(element: Element, shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(element.bytes(), |bytes, &axis| bytes.checked_mul(axis))
}

/// The type of an array's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Element {
    /// `bool`, a byte.
    Bool,
    /// `uint8_t`.
    U8,
    /// `uint16_t`.
    U16,
    /// `uint32_t`.
    U32,
    /// `uint64_t`.
    U64,
    /// `int8_t`.
    I8,
    /// `int16_t`.
    I16,
    /// `int32_t`.
    I32,
    /// `int64_t`.
    I64,
    /// `half`.
    F16,
    /// `bfloat`.
    BF16,
    /// `float`.
    F32,
}

impl Element {
    /// Its name in the text that MLX generates.
    pub fn name(self) -> &'static str {
        match self {
            Element::Bool => "bool",
            Element::U8 => "uint8_t",
            Element::U16 => "uint16_t",
            Element::U32 => "uint32_t",
            Element::U64 => "uint64_t",
            Element::I8 => "int8_t",
            Element::I16 => "int16_t",
            Element::I32 => "int32_t",
            Element::I64 => "int64_t",
            Element::F16 => "float16_t",
            Element::BF16 => "bfloat16_t",
            Element::F32 => "float",
        }
    }

    /// The size of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::Bool | Element::U8 | Element::I8 => 1,
            Element::U16 | Element::I16 | Element::F16 | Element::BF16 => 2,
            Element::U32 | Element::I32 | Element::F32 => 4,
            Element::U64 | Element::I64 => 8,
        }
    }

    /// Whether adding such elements in another order may give another sum.
    pub fn is_float(self) -> bool {
        matches!(self, Element::F16 | Element::BF16 | Element::F32)
    }

    /// The bytes of `value` as such an element, as MLX fills an output.
    pub(crate) fn encode(self, value: f32) -> Vec<u8> {
        match self {
            Element::Bool => vec![u8::from(value != 0.0)],
            Element::U8 => vec![value as u8],
            Element::I8 => vec![value as i8 as u8],
            Element::U16 => (value as u16).to_ne_bytes().to_vec(),
            Element::I16 => (value as i16).to_ne_bytes().to_vec(),
            Element::U32 => (value as u32).to_ne_bytes().to_vec(),
            Element::I32 => (value as i32).to_ne_bytes().to_vec(),
            Element::U64 => (value as u64).to_ne_bytes().to_vec(),
            Element::I64 => (value as i64).to_ne_bytes().to_vec(),
            Element::F32 => value.to_ne_bytes().to_vec(),
            Element::BF16 => ((value.to_bits() >> 16) as u16).to_ne_bytes().to_vec(),
            Element::F16 => half(value).to_ne_bytes().to_vec(),
        }
    }
}

/// The bits of the half-precision float next to zero from `value`: exact for what outputs are filled with.
fn half(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let exponent = (bits >> 23 & 0xff) as i32 - 127 + 15;
    let fraction = (bits >> 13 & 0x3ff) as u16;
    match exponent {
        _ if value.is_nan() => sign | 0x7e00,
        31.. => sign | 0x7c00,
        1.. => sign | (exponent as u16) << 10 | fraction,
        _ => sign,
    }
}

/// An argument of a kernel's template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Template {
    /// A type.
    Element(Element),
    /// An integer. MLX puts it in the function's name, so it must not be negative.
    Int(i32),
    /// A truth value.
    Bool(bool),
}

impl Template {
    /// What the template's parameter is declared as.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Template::Element(_) => "typename",
            Template::Int(_) => "int",
            Template::Bool(_) => "bool",
        }
    }

    pub(crate) fn is_negative(self) -> bool {
        matches!(self, Template::Int(value) if value < 0)
    }

    /// The argument as it is written.
    pub(crate) fn argument(self) -> String {
        match self {
            Template::Element(element) => element.name().to_owned(),
            Template::Int(value) => value.to_string(),
            Template::Bool(value) => u8::from(value).to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_filled_in_their_type() {
        assert_eq!(Element::F32.encode(-1.5), (-1.5f32).to_ne_bytes());
        assert_eq!(Element::BF16.encode(-1.5), 0xbfc0u16.to_ne_bytes());
        assert_eq!(Element::I8.encode(-3.0), [253]);
        assert_eq!(Element::U64.encode(7.0), 7u64.to_ne_bytes());
        assert_eq!(Element::Bool.encode(2.0), [1]);
        for (value, bits) in [
            (0.0, 0),
            (-0.0, 0x8000),
            (1.0, 0x3c00),
            (-1.5, 0xbe00),
            (65504.0, 0x7bff),
            (f32::INFINITY, 0x7c00),
            (f32::NEG_INFINITY, 0xfc00),
            (1e6, 0x7c00),
        ] {
            assert_eq!(Element::F16.encode(value), u16::to_ne_bytes(bits), "{value}");
        }
    }

    #[test]
    fn sizes_that_overflow_are_none() {
        assert_eq!(Input::new("x", Element::F32, [2, 3]).bytes(), Some(24));
        assert_eq!(Input::new("x", Element::U8, []).bytes(), Some(1));
        assert_eq!(Output::new("x", Element::F16, [usize::MAX]).bytes(), None);
    }

    #[test]
    fn strided_bytes_go_from_the_first_element_to_the_last() {
        let bytes = |shape: [usize; 2], strides: &[usize]| {
            Input::new("x", Element::F16, shape).with_strides(strides).bytes()
        };
        assert_eq!(bytes([2, 3], &[3, 1]), Some(12));
        assert_eq!(bytes([2, 3], &[100, 2]), Some(210));
        assert_eq!(bytes([2, 3], &[0, 1]), Some(6));
        assert_eq!(bytes([2, 0], &[1, 1]), Some(0));
        assert_eq!(bytes([2, 3], &[1]), None);
        assert_eq!(bytes([2, 3], &[usize::MAX, 1]), None);
    }
}

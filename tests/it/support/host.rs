//! Kernels on the CPU: each call under AddressSanitizer, each new pair of constants under every sanitizer, and each
//! kernel in every build.

use std::{
    collections::{BTreeSet, HashSet},
    env,
    path::Path,
    sync::{Mutex, OnceLock},
    time::Duration,
};

use metal_host::{Build, Check, Element, Host, Input, Launch, Output, Run, Source};
use mlx_primitives::{
    dispatch::Target,
    kernel::{self, Argument, Call, OutputSpec, Template},
};
use mlx_rs::{
    Array, Dtype,
    error::{Exception, Result},
};

use super::tensor::unravel;

/// Whether kernels run on the current stream: on a GPU they do, and on a CPU this lets them. A machine without the
/// compiler skips them, unless it has `CI` set.
pub(crate) fn install() -> bool {
    Target::current().unwrap() != Target::Cpu || installed()
}

fn installed() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        match Host::new(Path::new(env!("CARGO_TARGET_TMPDIR")).join("metal")) {
            Ok(host) => kernel::set_host(Ladder { host, climbed: Mutex::default() }),
            Err(error) => {
                assert!(env::var_os("CI").is_none(), "{error}");
                println!("skipped: kernels on the CPU: {error}");
                false
            }
        }
    })
}

/// How long a run may take, on a machine that does other things too: attention by matrices, which lanes act out by
/// asking each other, is the slowest under the sanitizer of memory.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Whether a kernel has been run on this host with a first input that ends in these axes.
pub(crate) fn has_run(kernel: &str, axes: &[i32]) -> bool {
    RUNS.lock().unwrap().iter().any(|(name, shape)| *name == kernel && shape.ends_with(axes))
}

/// Whether a kernel has been run on this host with this integer among its constants.
pub(crate) fn has_run_with(kernel: &str, constant: &str, value: i32) -> bool {
    CONSTANTS.lock().unwrap().contains(&(kernel, constant, value))
}

/// Kernels, names of their constants, and what these were.
static CONSTANTS: Mutex<BTreeSet<(&str, &str, i32)>> = Mutex::new(BTreeSet::new());

/// Kernels, and the shapes of their first inputs.
static RUNS: Mutex<BTreeSet<(&str, Vec<i32>)>> = Mutex::new(BTreeSet::new());

struct Ladder {
    host: Host,
    /// The kernels, and the pairs of constants, that have been run under every sanitizer.
    climbed: Mutex<HashSet<String>>,
}

impl kernel::Host for Ladder {
    fn run(&self, call: &Call) -> Result<Vec<Array>> {
        let shape = call.inputs().first().map_or(Vec::new(), |array| array.shape().to_vec());
        let name = call.kernel().name;
        RUNS.lock().unwrap().insert((name, shape));
        let integers = call.template().iter().filter_map(|&(constant, template)| match template {
            Template::Int(value) => Some((name, constant, value)),
            _ => None,
        });
        CONSTANTS.lock().unwrap().extend(integers);
        let source = source(call);
        let launch = Launch { grid: call.launch().grid(), group: call.launch().group };
        let bytes = kernel_inputs(call).map(|(argument, array)| passed_bytes(argument, array));
        let bytes = bytes.collect::<Result<Vec<_>>>()?;
        let bytes: Vec<_> = bytes.iter().map(Vec::as_slice).collect();
        let outputs = if let Some(builds) = self.climb(&source) {
            let check =
                Check { builds: builds.to_vec(), time_limit: TIME_LIMIT, ..Check::default() };
            self.host.check(&source, launch, &bytes, &check)
        } else {
            let run = Run { build: Build::Address, time_limit: TIME_LIMIT, ..Run::default() };
            self.host.run(&source, launch, &bytes, run)
        };
        let outputs = outputs.map_err(|error| Exception::custom(error.to_string()))?;
        let (outputs, written) = outputs.split_at(call.outputs().len());
        let inputs = kernel_inputs(call).filter(|(argument, _)| argument.is_written());
        inputs.zip(written).for_each(|((_, array), bytes)| write_back(array, bytes));
        call.outputs().iter().zip(outputs).map(|(spec, bytes)| array_of(spec, bytes)).collect()
    }
}

impl Ladder {
    /// The builds to run it in for what is new about it: the kernel itself, or some pair of its constants, which are
    /// flags and what there is none of, one or more. Races and memory that nothing wrote do not depend on the type of
    /// elements, nor on how many more; and what it takes three constants for, the sanitizer of addresses still sees,
    /// under which every call runs. What an optimiser makes of the text, it makes of all its variants.
    fn climb(&self, source: &Source) -> Option<&'static [Build]> {
        let kind = |template: &metal_host::Template| match *template {
            metal_host::Template::Element(_) => 0,
            metal_host::Template::Int(value) => value.clamp(0, 2),
            metal_host::Template::Bool(value) => value.into(),
        };
        let kinds: Vec<_> = source.template.iter().map(|(_, template)| kind(template)).collect();
        let places = 0..kinds.len();
        let pairs = places.clone().flat_map(|one| places.clone().map(move |other| [one, other]));
        let name = |[one, other]: [usize; 2]| {
            format!("{} {one} {} {other} {}", source.name, kinds[one], kinds[other])
        };
        let mut climbed = self.climbed.lock().unwrap();
        let first = climbed.insert(source.name.clone());
        let new: Vec<_> = pairs.map(name).filter(|pair| !climbed.contains(pair)).collect();
        let is_new = !new.is_empty();
        climbed.extend(new);
        match (first, is_new) {
            (true, _) => Some(&Build::ALL),
            (false, true) => Some(&Build::ALL[1..]),
            (false, false) => None,
        }
    }
}

fn source(call: &Call) -> Source {
    let kernel = call.kernel();
    let inputs = kernel_inputs(call);
    let outputs = kernel.outputs.iter().zip(call.outputs());
    let template = call.template().iter();
    Source {
        name: kernel.name.to_owned(),
        inputs: inputs.map(|(argument, array)| input(argument, array)).collect(),
        outputs: outputs.map(|(argument, spec)| output(argument, spec)).collect(),
        template: template.map(|&(name, value)| (name.to_owned(), template_of(value))).collect(),
        header: kernel.header(Target::Metal),
        body: kernel.body(),
        atomic_outputs: false,
    }
}

fn kernel_inputs(call: &Call) -> impl Iterator<Item = (&Argument, &Array)> {
    call.kernel().inputs.iter().zip(call.inputs())
}

fn input(argument: &Argument, array: &Array) -> Input {
    let input = Input::new(argument.name, element(array.dtype()), sizes(array.shape()));
    let input = if argument.is_written() { input.written() } else { input };
    match strides(argument, array) {
        Some(strides) => input.with_strides(strides),
        None => input,
    }
}

/// The strides of an evaluated array that the kernel reads by them. One with a reversed axis is copied, for its first
/// element is not the first in memory; so are strides that nobody will multiply by anything.
fn strides(argument: &Argument, array: &Array) -> Option<Vec<usize>> {
    array.eval().unwrap();
    let forward = array.strides().iter().all(|&stride| stride.cast_signed() >= 0);
    (argument.strided && forward).then(|| array.strides().to_vec())
}

/// The bytes from an input's first element to its last, as it lies in memory. Those between its elements are 0xFF, which
/// is NaN, for nothing may be made of them.
fn passed_bytes(argument: &Argument, array: &Array) -> Result<Vec<u8>> {
    let packed = bytes_of(array)?;
    let Some(strides) = strides(argument, array) else { return Ok(packed) };
    let (shape, size) = (sizes(array.shape()), element(array.dtype()).bytes());
    let place = |index: &[usize]| index.iter().zip(&strides).map(|(i, s)| i * s).sum::<usize>();
    let last: Vec<_> = shape.iter().map(|&size| size - 1).collect();
    let mut bytes = vec![0xff; (place(&last) + 1) * size];
    for (flat, element) in packed.chunks(size).enumerate() {
        let at = place(&unravel(flat, &shape)) * size;
        bytes[at..at + size].copy_from_slice(element);
    }
    Ok(bytes)
}

/// Writes an evaluated array that lies in rows where it lies, as a kernel would.
fn write_back(array: &Array, bytes: &[u8]) {
    assert_eq!(array.nbytes(), bytes.len());
    // SAFETY: the array is alive; evaluated, it has memory.
    let memory = unsafe { mlx_sys::mlx_array_data_uint8(array.as_ptr()) }.cast_mut();
    // SAFETY: the memory holds so many bytes, and whoever runs such a kernel has promised that nobody else reads or writes
    // them meanwhile.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory, bytes.len()) };
}

fn output(argument: &Argument, spec: &OutputSpec) -> Output {
    Output::new(argument.name, element(spec.dtype), sizes(&spec.shape))
}

fn sizes(shape: &[i32]) -> Vec<usize> {
    shape.iter().map(|&size| usize::try_from(size).unwrap()).collect()
}

fn template_of(value: Template) -> metal_host::Template {
    match value {
        Template::Dtype(dtype) => metal_host::Template::Element(element(dtype)),
        Template::Int(value) => metal_host::Template::Int(value),
        Template::Bool(value) => metal_host::Template::Bool(value),
    }
}

fn element(dtype: Dtype) -> Element {
    match dtype {
        Dtype::Bool => Element::Bool,
        Dtype::Uint8 => Element::U8,
        Dtype::Uint16 => Element::U16,
        Dtype::Uint32 => Element::U32,
        Dtype::Uint64 => Element::U64,
        Dtype::Int8 => Element::I8,
        Dtype::Int16 => Element::I16,
        Dtype::Int32 => Element::I32,
        Dtype::Int64 => Element::I64,
        Dtype::Float16 => Element::F16,
        Dtype::Bfloat16 => Element::BF16,
        Dtype::Float32 => Element::F32,
        other => panic!("no kernel takes {other:?}"),
    }
}

fn bytes_of(array: &Array) -> Result<Vec<u8>> {
    let bytes = array.contiguous()?.reshape(&[-1])?.view::<u8>()?;
    bytes.eval()?;
    Ok(bytes.as_slice::<u8>().to_vec())
}

fn array_of(spec: &OutputSpec, bytes: &[u8]) -> Result<Array> {
    let bytes = Array::from_slice(bytes, &[i32::try_from(bytes.len()).unwrap()]);
    bytes.view_dtype(spec.dtype)?.reshape(&spec.shape)
}

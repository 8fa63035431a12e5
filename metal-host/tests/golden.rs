//! `generate` writes what MLX writes: an exported function holds the text of its kernels, whether or not Metal is
//! there to run them.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    fs, ptr,
};

use metal_host::{Element, Input, Output, Source, Template, generate};
use mlx_sys::{mlx_array, mlx_stream, mlx_vector_array};

/// MLX's `Stream` on a GPU. Without one MLX makes none, though it takes one while a function is exported.
#[repr(C)]
struct GpuStream {
    index: c_int,
    device_type: c_int,
    device: c_int,
}

/// What the exported function needs to call the kernel.
struct Call<'a> {
    source: &'a Source,
    kernel: mlx_sys::mlx_fast_metal_kernel,
}

fn c(text: &str) -> CString {
    CString::new(text).unwrap()
}

fn dtype(element: Element) -> mlx_sys::mlx_dtype {
    match element {
        Element::Bool => mlx_sys::mlx_dtype__MLX_BOOL,
        Element::U8 => mlx_sys::mlx_dtype__MLX_UINT8,
        Element::U16 => mlx_sys::mlx_dtype__MLX_UINT16,
        Element::U32 => mlx_sys::mlx_dtype__MLX_UINT32,
        Element::U64 => mlx_sys::mlx_dtype__MLX_UINT64,
        Element::I8 => mlx_sys::mlx_dtype__MLX_INT8,
        Element::I16 => mlx_sys::mlx_dtype__MLX_INT16,
        Element::I32 => mlx_sys::mlx_dtype__MLX_INT32,
        Element::I64 => mlx_sys::mlx_dtype__MLX_INT64,
        Element::F16 => mlx_sys::mlx_dtype__MLX_FLOAT16,
        Element::BF16 => mlx_sys::mlx_dtype__MLX_BFLOAT16,
        Element::F32 => mlx_sys::mlx_dtype__MLX_FLOAT32,
    }
}

fn shape(axes: &[usize]) -> Vec<c_int> {
    axes.iter().map(|&axis| axis as c_int).collect()
}

fn array(input: &Input) -> mlx_array {
    let shape = shape(&input.shape);
    let bytes = vec![0u8; input.shape.iter().product::<usize>() * input.element.bytes()];
    let (axes, dtype) = (shape.len() as c_int, dtype(input.element));
    // SAFETY: MLX copies as many bytes as the shape and type say, and the shape.
    unsafe { mlx_sys::mlx_array_new_data(bytes.as_ptr().cast(), shape.as_ptr(), axes, dtype) }
}

fn names<'a>(names: impl Iterator<Item = &'a String>) -> mlx_sys::mlx_vector_string {
    let names: Vec<_> = names.map(|name| c(name)).collect();
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    // SAFETY: MLX copies the strings, which outlive the call.
    unsafe { mlx_sys::mlx_vector_string_new_data(pointers.as_mut_ptr(), pointers.len()) }
}

fn kernel(source: &Source) -> mlx_sys::mlx_fast_metal_kernel {
    let inputs = names(source.inputs.iter().map(|input| &input.name));
    let outputs = names(source.outputs.iter().map(|output| &output.name));
    let [name, body, header] = [&source.name, &source.body, &source.header].map(|text| c(text));
    // SAFETY: MLX copies all of it.
    unsafe {
        mlx_sys::mlx_fast_metal_kernel_new(
            name.as_ptr(),
            inputs,
            outputs,
            body.as_ptr(),
            header.as_ptr(),
            true,
            source.atomic_outputs,
        )
    }
}

fn config(source: &Source) -> mlx_sys::mlx_fast_metal_kernel_config {
    // SAFETY: it needs nothing.
    let config = unsafe { mlx_sys::mlx_fast_metal_kernel_config_new() };
    for output in &source.outputs {
        let shape = shape(&output.shape);
        let (start, axes, dtype) = (shape.as_ptr(), shape.len(), dtype(output.element));
        // SAFETY: MLX copies the shape.
        let status = unsafe {
            mlx_sys::mlx_fast_metal_kernel_config_add_output_arg(config, start, axes, dtype)
        };
        assert_eq!(status, 0);
    }
    for (name, value) in &source.template {
        assert_eq!(add_argument(config, &c(name), *value), 0);
    }
    // SAFETY: the configuration is alive.
    assert_eq!(unsafe { mlx_sys::mlx_fast_metal_kernel_config_set_grid(config, 8, 1, 1) }, 0);
    // SAFETY: the configuration is alive.
    let status = unsafe { mlx_sys::mlx_fast_metal_kernel_config_set_thread_group(config, 8, 1, 1) };
    assert_eq!(status, 0);
    config
}

fn add_argument(
    config: mlx_sys::mlx_fast_metal_kernel_config,
    name: &CStr,
    value: Template,
) -> c_int {
    use mlx_sys::{
        mlx_fast_metal_kernel_config_add_template_arg_bool as add_bool,
        mlx_fast_metal_kernel_config_add_template_arg_dtype as add_dtype,
        mlx_fast_metal_kernel_config_add_template_arg_int as add_int,
    };
    let name = name.as_ptr();
    match value {
        // SAFETY: MLX copies the name.
        Template::Element(element) => unsafe { add_dtype(config, name, dtype(element)) },
        // SAFETY: MLX copies the name.
        Template::Int(value) => unsafe { add_int(config, name, value) },
        // SAFETY: MLX copies the name.
        Template::Bool(value) => unsafe { add_bool(config, name, value) },
    }
}

/// The function that is exported: it calls the kernel.
unsafe extern "C" fn apply(
    outputs: *mut mlx_vector_array,
    inputs: mlx_vector_array,
    call: *mut c_void,
) -> c_int {
    // SAFETY: `exported` passes a `Call` that outlives the export.
    let call = unsafe { &*call.cast::<Call<'_>>() };
    let config = config(call.source);
    let mut stream = GpuStream { index: -1, device_type: 1, device: 0 };
    let stream = mlx_stream { ctx: (&raw mut stream).cast() };
    // SAFETY: all are alive, and `stream` points to what MLX takes for its class, which it only copies.
    unsafe { mlx_sys::mlx_fast_metal_kernel_apply(outputs, call.kernel, inputs, config, stream) }
}

unsafe extern "C" fn forget(_call: *mut c_void) {}

/// The bytes of a file with a function that calls the kernel.
fn exported(source: &Source) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("function.mlxfn");
    let arrays: Vec<_> = source.inputs.iter().map(array).collect();
    // SAFETY: MLX copies the handles.
    let arguments = unsafe { mlx_sys::mlx_vector_array_new_data(arrays.as_ptr(), arrays.len()) };
    let mut call = Call { source, kernel: kernel(source) };
    let payload = ptr::from_mut(&mut call).cast();
    // SAFETY: `apply` reads the payload only while the function is exported.
    let closure =
        unsafe { mlx_sys::mlx_closure_new_func_payload(Some(apply), payload, Some(forget)) };
    let file = c(path.to_str().unwrap());
    // SAFETY: every handle is alive.
    let status = unsafe { mlx_sys::mlx_export_function(file.as_ptr(), closure, arguments, false) };
    assert_eq!(status, 0);
    fs::read(&path).unwrap()
}

/// Asserts that MLX's text is `generate`'s, from its first byte to its last.
fn assert_same(source: Source) {
    let text = generate(&source).text;
    let file = exported(&source);
    // In the file a string stands after its length.
    let string = [&(text.len() as u64).to_ne_bytes(), text.as_bytes()].concat();
    let found = file.windows(string.len()).any(|window| window == string);
    assert!(found, "MLX writes\n{}\nbut generate writes\n{text}", shown(&file, &source.name));
}

/// What in `file` is near the kernel's text.
fn shown(file: &[u8], name: &str) -> String {
    let text = String::from_utf8_lossy(file).into_owned();
    let start = text.find(&format!("custom_kernel_{name}")).unwrap_or(0);
    text[start..].chars().filter(|&c| c == '\n' || !c.is_control()).collect()
}

fn source(name: &str, body: &str) -> Source {
    Source {
        name: name.into(),
        inputs: vec![Input::new("x", Element::F32, [4, 5])],
        outputs: vec![Output::new("y", Element::F32, [4, 5])],
        body: body.into(),
        ..Source::default()
    }
}

const COPY: &str = "uint i = thread_position_in_grid.x;\ny[i] = x[i];";

#[test]
fn a_plain_kernel() {
    assert_same(source("plain", COPY));
    assert_same(Source {
        header: "inline int f() { return 1; }\n".into(),
        ..source("header", COPY)
    });
}

#[test]
fn a_kernel_without_attributes() {
    assert_same(source("alone", "y[0] = x[0];"));
    assert_same(source("shape_alone", "y[0] = x_shape[0];"));
    let outputs = vec![Output::new("y", Element::F32, [1]), Output::new("z", Element::I8, [2])];
    assert_same(Source { outputs: outputs.clone(), ..source("two", "y[0] = z[0] = x[0];") });
    // MLX closes the list too early here, and so must we.
    assert_same(Source { outputs, ..source("wrong", "y[0] = z[0] = x_shape[0];") });
}

#[test]
fn every_element_type() {
    use Element::*;
    for element in [Bool, U8, U16, U32, U64, I8, I16, I32, I64, F16, BF16, F32] {
        assert_same(Source {
            inputs: vec![Input::new("x", element, [3, 3]), Input::new("s", element, [])],
            outputs: vec![Output::new("y", element, [9])],
            template: vec![("T".into(), Template::Element(element))],
            ..source("types", COPY)
        });
    }
}

#[test]
fn template_arguments() {
    let template = |arguments: &[(&str, Template)]| {
        arguments.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
    };
    for arguments in [
        &[("N", Template::Int(3))][..],
        &[("N", Template::Int(0)), ("B", Template::Bool(true)), ("C", Template::Bool(false))],
        &[("T", Template::Element(Element::BF16)), ("N", Template::Int(1234567))],
    ] {
        assert_same(Source { template: template(arguments), ..source("template", COPY) });
    }
}

#[test]
fn small_and_empty_shapes() {
    for shape in [vec![], vec![1], vec![7], vec![8], vec![2, 2], vec![0], vec![3, 0, 2]] {
        let body = format!("{COPY} // x_shape x_strides x_ndim");
        let inputs = vec![Input::new("x", Element::F16, shape), Input::new("w", Element::I64, [9])];
        assert_same(Source { inputs, ..source("small", &body) });
    }
}

#[test]
fn sizes_that_the_body_names() {
    let sizes = ["_shape", "_strides", "_ndim"];
    for used in 0..8 {
        let names = (0..3).filter(|bit| used >> bit & 1 == 1).map(|bit| format!("x{}", sizes[bit]));
        let body = format!("{COPY} // {}", names.collect::<Vec<_>>().join(" "));
        assert_same(source("sizes", &body));
    }
    // In the header they do not count.
    assert_same(Source { header: "// x_shape x_ndim\n".into(), ..source("unnamed", COPY) });
}

#[test]
fn attributes_anywhere_in_the_body() {
    for attribute in [
        "dispatch_quadgroups_per_threadgroup",
        "dispatch_simdgroups_per_threadgroup",
        "dispatch_threads_per_threadgroup",
        "grid_origin",
        "grid_size",
        "quadgroup_index_in_threadgroup",
        "quadgroups_per_threadgroup",
        "simdgroup_index_in_threadgroup",
        "simdgroups_per_threadgroup",
        "thread_execution_width",
        "thread_index_in_quadgroup",
        "thread_index_in_simdgroup",
        "thread_index_in_threadgroup",
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threadgroups_per_grid",
        "threads_per_grid",
        "threads_per_simdgroup",
        "threads_per_threadgroup",
    ] {
        assert_same(source("attribute", &format!("y[0] = x[0]; // {attribute}s")));
    }
    let two = "y[0] = threads_per_grid.x + simdgroup_index_in_threadgroup + grid_size.y;";
    assert_same(source("attributes", two));
}

#[test]
fn outputs_that_are_atomic_or_several() {
    let outputs = vec![Output::new("y", Element::U32, [4]), Output::new("z", Element::F32, [])];
    assert_same(Source { outputs: outputs.clone(), ..source("several", COPY) });
    assert_same(Source { outputs, atomic_outputs: true, ..source("atomic", COPY) });
}

#[test]
fn no_inputs() {
    assert_same(Source { inputs: vec![], ..source("none", "y[thread_position_in_grid.x] = 1;") });
}

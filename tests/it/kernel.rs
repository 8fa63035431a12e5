//! The launcher, and what is true of every kernel.

use std::{collections::BTreeSet, fs, path::Path};

use metal_host::ATTRIBUTES;
use mlx_primitives::{
    kernel::{Argument, Call, File, Kernel, Launch, Plan},
    kernels,
};
use mlx_rs::{
    Array, Dtype,
    ops::{
        broadcast_to,
        indexing::{IndexOp, IntoStrideBy},
    },
};

use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    host,
    sample::{normal, strided},
    tensor::Tensor,
};

static COPY: Kernel = Kernel {
    name: "copy",
    inputs: &[Argument::of("T", "x", &["N"])],
    outputs: &[Argument::of("T", "y", &["N"])],
    constants: &[],
    fragments: &[File::new("common/chunk.metal", include_str!("../../metal/common/chunk.metal"))],
    file: File::new("bench/copy.metal", include_str!("../../metal/bench/copy.metal")),
};

fn copy(x: &Array) -> Array {
    let launch = Launch { groups: [40, 1, 1], group: [64, 1, 1], threadgroup_bytes: 0 };
    let plan = Plan { constants: Vec::new(), extents: Vec::new(), launch };
    let call = Call::new(&COPY, &[x], plan).unwrap();
    // SAFETY: 40 · 64 threads of 4 elements or more cover every array here, each element once, and the kernel checks
    // the end of its arrays.
    unsafe { call.run_unchecked() }.unwrap().remove(0)
}

#[test]
fn a_kernel_of_ones_own_runs() {
    if !host::install() {
        return;
    }
    for dtype in FLOATING {
        for length in [1, 7, 8, 9, 1000, 4097] {
            let x = normal(1, &[length], dtype);
            assert_close("copy", &copy(&x), &Tensor::of(&x), Tolerance::EXACT);
        }
    }
}

#[test]
fn inputs_are_read_in_order_whatever_their_strides() {
    if !host::install() {
        return;
    }
    let x = strided(&normal(1, &[1001], Dtype::Float32));
    assert_close("copy", &copy(&x), &Tensor::of(&x), Tolerance::EXACT);
    assert_close(
        "copy of a scalar",
        &copy(&Array::from_f32(2.5)),
        &Tensor::new(&[1], vec![2.5]),
        Tolerance::EXACT,
    );
}

static GATHER: Kernel = Kernel {
    name: "gather",
    inputs: &[Argument::of("T", "x", &["N", "D"]).strided(), Argument::of("T", "bias", &["D"])],
    outputs: &[Argument::of("T", "y", &["N", "D"])],
    constants: &[],
    fragments: &[],
    file: File::new(
        "test/gather.metal",
        "const uint i = thread_position_in_grid.x;\n\
               const uint width = x_shape[1];\n\
               if (i < uint(x_shape[0]) * width) {\n\
               const long at = long(i / width) * x_strides[0] + long(i % width) * x_strides[1];\n\
               y[i] = x[at] + bias[i % width];\n\
               }\n",
    ),
};

fn gather(x: &Array, bias: &Array) -> Array {
    let launch = Launch { groups: [4, 1, 1], group: [64, 1, 1], threadgroup_bytes: 0 };
    let plan = Plan { constants: Vec::new(), extents: Vec::new(), launch };
    let call = Call::new(&GATHER, &[x, bias], plan).unwrap();
    // SAFETY: each of 256 threads writes an element of its own, if there is one; no array here has more.
    unsafe { call.run_unchecked() }.unwrap().remove(0)
}

#[test]
fn a_strided_input_is_read_where_it_lies() {
    if !host::install() {
        return;
    }
    let wide = normal(1, &[7, 5, 9], Dtype::Float32);
    let row = normal(2, &[1, 9], Dtype::Float32);
    for (what, x) in [
        ("in rows", wide.index((3, .., ..))),
        ("transposed", wide.index((3, .., ..)).transpose().unwrap()),
        ("a slice", wide.index((2, 1..4, 2..8))),
        ("a slice of an axis before", wide.index((1..6, 2, ..))),
        ("every other element", strided(&wide.index((0, .., ..)))),
        ("reversed", wide.index((0, .., ..)).index((.., (..).stride_by(-1)))),
        ("one row for all", broadcast_to(&row, &[6, 9]).unwrap()),
        ("one number for all", broadcast_to(Array::from_f32(2.5), &[3, 4]).unwrap()),
        ("fewer than 8 elements", wide.index((5, 1..4, 3..5))),
    ] {
        // Every other element of a longer one: an input that is not strided is still read in rows.
        let bias = strided(&normal(3, &[x.shape()[1]], Dtype::Float32));
        let expected = Tensor::of(&x.add(&bias).unwrap());
        assert_close(what, &gather(&x, &bias), &expected, Tolerance::EXACT);
    }
}

#[test]
fn a_mistake_in_the_text_is_told_with_its_file_and_line() {
    static BROKEN: Kernel = Kernel {
        name: "broken",
        fragments: &[],
        file: File::new(
            "test/broken.metal",
            "// A mistake.\n// ---- body ----\ny[thread_position_in_grid.x] = nonsense;\n",
        ),
        ..COPY
    };
    if !host::install() {
        return;
    }
    let launch = Launch { groups: [1, 1, 1], group: [32, 1, 1], threadgroup_bytes: 0 };
    let plan = Plan { constants: Vec::new(), extents: Vec::new(), launch };
    let call = Call::new(&BROKEN, &[&normal(1, &[8], Dtype::Float32)], plan).unwrap();
    // SAFETY: it does not compile, so nothing runs.
    let run = unsafe { call.run_unchecked() };
    let error = run.and_then(|outputs| outputs[0].eval()).unwrap_err();
    let told = error.what();
    assert!(
        told.contains("test/broken.metal:3") || told.contains("test/broken.metal(3)"),
        "{told}"
    );
}

#[test]
fn names_are_unique() {
    let names: Vec<_> = kernels().map(|kernel| kernel.name).collect();
    let unique: BTreeSet<_> = names.iter().collect();
    assert!(!names.is_empty());
    assert_eq!(unique.len(), names.len(), "{names:?}");
}

#[test]
fn every_file_is_a_kernel_and_every_kernel_a_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("metal");
    let mut files = BTreeSet::new();
    collect(&root, &root, &mut files);
    let known: BTreeSet<_> = kernels().map(|kernel| kernel.file.path.to_owned()).collect();
    assert_eq!(known, files);
}

/// The launchable kernels below `folder`: what is not shared, of a target, or for benches alone.
fn collect(root: &Path, folder: &Path, files: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if ["bench", "common", "targets"].contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() {
            collect(root, &path, files);
        } else {
            files.insert(name);
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for kernel in kernels() {
        let text = kernel.file.text;
        let path = kernel.file.path;
        assert!(text.starts_with("// "), "{path}: the first line says what it computes");
        for word in ["Grid:", "Threadgroup memory:", "\n// ---- body ----\n"] {
            assert!(text.contains(word), "{path}: {word}");
        }
        for argument in kernel.inputs.iter().chain(kernel.outputs) {
            let (header, _) = text.split_once("// ---- body ----").unwrap();
            assert!(header.contains(argument.name), "{path}: what is {}?", argument.name);
        }
    }
}

/// No machine without CUDA's compiler would notice otherwise.
#[test]
fn what_kernels_call_of_metal_is_there_on_nvidia_too() {
    let header = without_comments(include_str!("../../metal/targets/cuda.h"));
    let there: BTreeSet<_> = words(&header).collect();
    for kernel in kernels() {
        for file in kernel.fragments.iter().chain([&kernel.file]) {
            let text = without_comments(file.text);
            let called = text.split("metal::").skip(1).filter_map(|rest| words(rest).next());
            let places =
                words(&text).filter(|word| ATTRIBUTES.iter().any(|(name, _)| name == word));
            let missing: Vec<_> =
                called.chain(places).filter(|word| !there.contains(word)).collect();
            assert!(missing.is_empty(), "{}: {missing:?}", file.path);
        }
    }
}

fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap().to_owned() + "\n").collect()
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

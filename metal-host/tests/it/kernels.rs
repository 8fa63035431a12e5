//! Right kernels: every build agrees, and the numbers are those of loops in f64.

use metal_host::{Check, Element, Input, Launch, METAL_TARGET, Output, Source, Template};

use crate::support::{FLOATS, assert_close, decode, encode, host, kernel, numbers, rounding};

fn row_sum(element: Element, rows: usize, columns: usize) -> Source {
    Source {
        inputs: vec![Input::new("x", element, [rows, columns])],
        outputs: vec![Output::new("y", element, [rows])],
        template: vec![("T".into(), Template::Element(element))],
        ..kernel("row_sum")
    }
}

#[test]
fn row_sums_are_right() {
    let Some(host) = host() else { return };
    // The last has fewer than 8 elements, and so another signature.
    for (rows, columns, threads) in [(3, 1000, 96), (2, 3333, 1024), (2, 3, 32)] {
        for element in FLOATS {
            let (x, values) = encode(element, &numbers(1, rows * columns));
            let launch =
                Launch { grid: [(rows * threads) as u32, 1, 1], group: [threads as u32, 1, 1] };
            let source = row_sum(element, rows, columns);
            let outputs = host.check(&source, launch, &[&x], &Check::default()).unwrap();
            let row = |r: usize| &values[r * columns..][..columns];
            let expected: Vec<f64> = (0..rows).map(|r| row(r).iter().sum()).collect();
            // One rounding to the type, and one to float for each of at most `columns` additions.
            let bound = |r: usize| {
                let size: f64 = row(r).iter().map(|x| x.abs()).sum();
                expected[r].abs() * rounding(element) * 1.01
                    + size * columns as f64 * rounding(Element::F32)
            };
            let what = format!("row_sum {element:?} {rows}x{columns}");
            assert_close(&what, &decode(element, &outputs[0]), &expected, bound);
        }
    }
}

#[test]
fn scans_are_right() {
    let Some(host) = host() else { return };
    for (rows, columns, threads) in [(2, 1000, 128), (1, 5, 32), (3, 257, 256)] {
        let element = Element::F32;
        let (x, values) = encode(element, &numbers(2, rows * columns));
        let source = Source {
            inputs: vec![Input::new("x", element, [rows, columns])],
            outputs: vec![Output::new("y", element, [rows, columns])],
            ..kernel("scan")
        };
        let launch = Launch { grid: [threads, rows as u32, 1], group: [threads, 1, 1] };
        let outputs = host.check(&source, launch, &[&x], &Check::default()).unwrap();
        let mut expected = Vec::new();
        for row in values.chunks(columns) {
            let mut sum = 0.0;
            expected.extend(row.iter().map(|x| {
                sum += x;
                sum
            }));
        }
        // Partial sums stay below 32 here, and no more than `columns` of them are rounded.
        let bound = |_| 32.0 * columns as f64 * rounding(element);
        assert_close(
            &format!("scan {rows}x{columns}"),
            &decode(element, &outputs[0]),
            &expected,
            bound,
        );
    }
}

#[test]
fn matrix_products_are_right() {
    let Some(host) = host() else { return };
    for (m, k, n) in [(33, 47, 31), (2, 3, 2)] {
        for element in FLOATS {
            let (a, left) = encode(element, &numbers(3, m * k));
            let (b, right) = encode(element, &numbers(4, k * n));
            let source = Source {
                inputs: vec![Input::new("a", element, [m, k]), Input::new("b", element, [k, n])],
                outputs: vec![Output::new("c", element, [m, n])],
                template: vec![("T".into(), Template::Element(element))],
                ..kernel("matmul")
            };
            let tiles = |size: usize| size.div_ceil(32) as u32;
            let launch = Launch { grid: [tiles(n) * 128, tiles(m), 1], group: [128, 1, 1] };
            let outputs = host.check(&source, launch, &[&a, &b], &Check::default()).unwrap();
            let terms = |e: usize| {
                let (row, column) = (e / n, e % n);
                (0..k).map(|i| left[row * k + i] * right[i * n + column]).collect::<Vec<_>>()
            };
            let expected: Vec<f64> = (0..m * n).map(|e| terms(e).iter().sum()).collect();
            let bound = |e: usize| {
                let size: f64 = terms(e).iter().map(|x| x.abs()).sum();
                expected[e].abs() * rounding(element) * 1.01
                    + size * (2 * k) as f64 * rounding(Element::F32)
            };
            let what = format!("matmul {element:?} {m}x{k}x{n}");
            assert_close(&what, &decode(element, &outputs[0]), &expected, bound);
        }
    }
}

#[test]
fn histograms_are_right() {
    let Some(host) = host() else { return };
    let values: Vec<u32> = numbers(5, 1000).iter().map(|x| (x.abs() * 16.0) as u32).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    let source = Source {
        inputs: vec![Input::new("x", Element::U32, [1000])],
        outputs: vec![Output::new("counts", Element::U32, [16])],
        atomic_outputs: true,
        ..kernel("histogram")
    };
    // The last group has 40 threads.
    let launch = Launch { grid: [1000, 1, 1], group: [64, 1, 1] };
    let check = Check { init_value: Some(0.0), ..Check::default() };
    let outputs = host.check(&source, launch, &[&bytes], &check).unwrap();
    let mut expected = [0u32; 16];
    values.iter().for_each(|&value| expected[value as usize] += 1);
    assert_eq!(outputs[0], expected.map(u32::to_ne_bytes).concat());
}

#[test]
fn vectors_and_constant_inputs_are_right() {
    let Some(host) = host() else { return };
    for element in FLOATS {
        let count = 36;
        let (x, values) = encode(element, &numbers(6, count));
        let (w, weights) = encode(element, &numbers(7, 4));
        let (b, offset) = encode(element, &numbers(8, 1));
        let source = Source {
            inputs: vec![
                Input::new("x", element, [count]),
                Input::new("w", element, [4]),
                Input::new("b", element, [1]),
            ],
            outputs: vec![Output::new("y", element, [count])],
            template: vec![("T".into(), Template::Element(element))],
            ..kernel("weighted")
        };
        let launch = Launch { grid: [(count / 4) as u32, 1, 1], group: [4, 1, 1] };
        for fast_contract in [false, true] {
            let check = Check { fast_contract, ..Check::default() };
            let outputs = host.check(&source, launch, &[&x, &w, &b], &check).unwrap();
            let expected: Vec<f64> =
                (0..count).map(|i| weights[i % 4] * values[i] + offset[0]).collect();
            // Rounded twice: to float, whatever size cancelled, then to the type.
            let bound = |i: usize| {
                expected[i].abs() * rounding(element) * 1.01 + 2.0 * rounding(Element::F32)
            };
            let what = format!("weighted {element:?}");
            assert_close(&what, &decode(element, &outputs[0]), &expected, bound);
        }
    }
}

#[test]
fn sums_of_floats_in_any_order_are_let_pass() {
    let Some(host) = host() else { return };
    let (x, values) = encode(Element::F32, &numbers(9, 1000));
    let mut source = kernel("copy");
    source.body = source
        .body
        .replace("y[i] = same(x[i]);", "atomic_fetch_add_explicit(y, x[i], memory_order_relaxed);");
    source.inputs = vec![Input::new("x", Element::F32, [1000])];
    source.outputs = vec![Output::new("y", Element::F32, [1])];
    source.atomic_outputs = true;
    let launch = Launch { grid: [1000, 1, 1], group: [32, 1, 1] };
    let check = Check { init_value: Some(0.0), ..Check::default() };
    let outputs = host.check(&source, launch, &[&x], &check).unwrap();
    let size: f64 = values.iter().map(|x| x.abs()).sum();
    let bound = |_| size * 1000.0 * rounding(Element::F32);
    assert_close("sum", &decode(Element::F32, &outputs[0]), &[values.iter().sum()], bound);
}

/// Writes every second element of `pool` where it lies, by a pointer that MLX declares `const`.
fn writes_in_place(stored: &str) -> Source {
    Source {
        name: "writes_in_place".into(),
        inputs: vec![
            Input::new("x", Element::F32, [8]),
            Input::new("pool", Element::F32, [16]).written(),
        ],
        outputs: vec![Output::new("y", Element::F32, [8])],
        header: METAL_TARGET.into(),
        body: format!(
            "const uint i = thread_position_in_grid.x;\nWRITTEN(float, pool)[2 * i] = {stored};\ny[i] = -x[i];"
        ),
        ..Source::default()
    }
}

#[test]
fn a_written_input_is_returned_after_the_outputs() {
    let Some(host) = host() else { return };
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<_>>();
    let x: Vec<f32> = (1..9).map(|i| i as f32).collect();
    let launch = Launch { grid: [8, 1, 1], group: [8, 1, 1] };
    let inputs = [bytes(&x), bytes(&[0.5; 16])];
    let inputs: Vec<_> = inputs.iter().map(Vec::as_slice).collect();
    let outputs = host.check(&writes_in_place("x[i]"), launch, &inputs, &Check::default()).unwrap();
    let pool: Vec<f32> = x.iter().flat_map(|&x| [x, 0.5]).collect();
    let negated: Vec<f32> = x.iter().map(|x| -x).collect();
    assert_eq!(outputs, [bytes(&negated), bytes(&pool)]);

    let racing = writes_in_place("pool[0]");
    let error = host.check(&racing, launch, &inputs, &Check::default()).unwrap_err();
    assert!(error.to_string().contains("race"), "{error}");
    let unset = "({ THREADGROUP_ARRAY(float, none, [1]); none[0]; })";
    let error = host.check(&writes_in_place(unset), launch, &inputs, &Check::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("element 0 of `pool`"), "{error}");
}

//! Right kernels: every build agrees, and the numbers are those of loops in f64.

use metal_host::{Check, Element, Input, Launch, Output, Source, Template};

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
    for (rows, columns, threads) in [(3, 1000, 96), (2, 33, 64), (2, 3, 32)] {
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

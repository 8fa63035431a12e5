//! The example of the README, word for word.

use crate::support::host;

const README: &str = include_str!("../../README.md");

#[test]
fn the_example_is_this_one() {
    let (_, example) = include_str!("readme.rs").split_once("// ---- example ----\n").unwrap();
    assert!(README.contains(example), "README.md does not hold\n{example}");
}

// ---- example ----
use metal_host::{Check, Element, Host, Input, Launch, METAL_TARGET, Output, Source, Template};

/// The file `double.metal` of this test.
const DOUBLE: &str = "\
const uint i = thread_position_in_grid.x;
y[i] = 2 * x[i];
";

#[test]
fn doubles() -> Result<(), Box<dyn std::error::Error>> {
    let Some(host) = host() else { return Ok(()) };
    let x: Vec<u8> = (0..100).flat_map(|i| (i as f32).to_ne_bytes()).collect();
    let outputs = double(host, Element::F32, &x)?;
    let expected: Vec<u8> = (0..100).flat_map(|i| (2.0 * i as f32).to_ne_bytes()).collect();
    assert_eq!(outputs, [expected]);
    Ok(())
}

fn double(host: &Host, element: Element, x: &[u8]) -> metal_host::Result<Vec<Vec<u8>>> {
    let count = x.len() / element.bytes();
    let source = Source {
        name: "double".into(),
        inputs: vec![Input::new("x", element, [count])],
        outputs: vec![Output::new("y", element, [count])],
        template: vec![("T".into(), Template::Element(element))],
        // Helpers would follow; findings name the lines of the files that `#line` tells.
        header: METAL_TARGET.into(),
        body: format!("#line 1 \"double.metal\"\n{DOUBLE}"),
        atomic_outputs: false,
    };
    let launch = Launch { grid: [count as u32, 1, 1], group: [32, 1, 1] };
    host.check(&source, launch, &[x], &Check::default())
}

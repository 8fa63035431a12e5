//! What makes no sense is an error that says so, and nothing is compiled or run.

use metal_host::{Build, Element, Error, Host, Input, Launch, Output, Run, Source, Template};

use crate::support::host;

fn source() -> Source {
    Source {
        name: "add".into(),
        inputs: vec![Input::new("a", Element::F32, [2, 3]), Input::new("b", Element::U8, [])],
        outputs: vec![Output::new("y", Element::F32, [2, 3])],
        template: vec![("N".into(), Template::Int(1))],
        body: "y[thread_position_in_grid.x] = a[thread_position_in_grid.x] + b;".into(),
        ..Source::default()
    }
}

const LAUNCH: Launch = Launch { grid: [6, 1, 1], group: [6, 1, 1] };
const A: [u8; 24] = [0; 24];
const B: [u8; 1] = [7];

fn run(
    host: &Host,
    source: &Source,
    launch: Launch,
    inputs: &[&[u8]],
) -> Result<Vec<Vec<u8>>, Error> {
    host.run(source, launch, inputs, Run::default())
}

#[test]
fn a_kernel_that_makes_sense_runs_in_every_build() {
    let Some(host) = host() else { return };
    for build in Build::ALL {
        let run = Run { build, ..Run::default() };
        let outputs = host.run(&source(), LAUNCH, &[&A, &B], run).unwrap();
        assert_eq!(outputs, [[7.0f32; 6].map(f32::to_ne_bytes).concat()]);
    }
}

#[test]
fn wrong_inputs_are_refused() {
    let Some(host) = host() else { return };
    let refused = |inputs: &[&[u8]], words: &str| match run(host, &source(), LAUNCH, inputs) {
        Err(error @ Error::Invalid { .. }) => {
            assert!(error.to_string().contains(words), "{error}");
            assert!(error.to_string().starts_with("[add] "), "{error}");
        }
        other => panic!("{other:?}"),
    };
    refused(&[], "has 2 inputs but was given 0");
    refused(&[&A], "has 2 inputs but was given 1");
    refused(&[&A, &B, &B], "has 2 inputs but was given 3");
    refused(&[&A[1..], &B], "`a` is F32 of shape [2, 3] but has 23 bytes");
    refused(&[&A, &[]], "`b` is U8 of shape [] but has 0 bytes");
}

#[test]
fn wrong_launches_are_refused() {
    let Some(host) = host() else { return };
    let refused =
        |grid, group, words: &str| match run(host, &source(), Launch { grid, group }, &[&A, &B]) {
            Err(error @ Error::Invalid { .. }) => {
                assert!(error.to_string().contains(words), "{error}")
            }
            other => panic!("{other:?}"),
        };
    refused([0, 1, 1], [1, 1, 1], "empty axis");
    refused([1, 1, 1], [1, 1, 0], "empty axis");
    refused([1, 1, 1], [1025, 1, 1], "a group of 1025 threads exceeds 1024");
    refused([1, 1, 1], [u32::MAX, u32::MAX, u32::MAX], "exceeds 1024");
}

#[test]
fn wrong_sources_are_refused() {
    let Some(host) = host() else { return };
    let refused = |change: fn(&mut Source), words: &str| {
        let mut source = source();
        change(&mut source);
        match run(host, &source, LAUNCH, &[&A, &B]) {
            Err(error @ Error::Invalid { .. }) => {
                assert!(error.to_string().contains(words), "{error}")
            }
            other => panic!("{other:?}"),
        }
    };
    refused(|source| source.outputs.clear(), "must have an output");
    refused(|source| source.name = "a b".into(), "letters, digits and underscores");
    refused(|source| source.inputs[0].name = "1a".into(), "`1a` is no name");
    refused(|source| source.outputs[0].name = String::new(), "`` is no name");
    refused(|source| source.template[0].0 = "a-b".into(), "`a-b` is no name");
    refused(|source| source.template[0].1 = Template::Int(-1), "N is Int(-1)");
    refused(|source| source.outputs[0].shape = vec![usize::MAX, 2], "`y` is larger than memory");
    refused(|source| source.outputs[0].shape = vec![1 << 50], "`y` is larger than memory");
}

#[test]
fn a_rule_that_is_broken_is_told_before_anything_is_compiled() {
    let Some(host) = host() else { return };
    let body = "#line 5 \"a.metal\"\nthreadgroup float t[4];\n".to_owned();
    match run(host, &Source { body, ..source() }, LAUNCH, &[&A, &B]) {
        Err(Error::Rule { place, .. }) => assert_eq!(place.to_string(), "a.metal:5"),
        other => panic!("{other:?}"),
    }
}

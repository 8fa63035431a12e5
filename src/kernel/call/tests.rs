#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use super::*;
use crate::kernel::File;

static SCALE: Kernel = Kernel {
    name: "scale",
    inputs: &[
        Argument::of("T", "x", &["N", "D"]),
        Argument::of("W", "weight", &["D"]),
        Argument::fixed(Dtype::Int32, "ids", &["2"]),
    ],
    outputs: &[
        Argument::of("T", "y", &["N", "D"]),
        Argument::fixed(Dtype::Float32, "sums", &["G"]),
    ],
    constants: &["EPS", "SCALED"],
    fragments: &[],
    file: File::new("scale.metal", ""),
};

fn plan() -> Plan {
    Plan {
        constants: vec![Constant::Float(1.0), Constant::Bool(true)],
        extents: vec![("G", 7)],
        launch: Launch { groups: [3, 1, 1], group: [32, 1, 1], threadgroup_bytes: 0 },
    }
}

fn array(shape: &[i32], dtype: Dtype) -> Array {
    mlx_rs::ops::zeros_dtype(shape, dtype).unwrap()
}

fn call(x: &[i32], weight: &[i32], ids: Dtype) -> Result<Call> {
    let x = array(x, Dtype::Float16);
    let (weight, ids) = (array(weight, Dtype::Float32), array(&[2], ids));
    Call::new(&SCALE, &[&x, &weight, &ids], plan())
}

fn refusal(call: Result<Call>) -> String {
    call.unwrap_err().to_string()
}

#[test]
fn a_constant_is_none_below_zero() {
    let template = |constant: Constant| constant.template(Check::op("scale"), "EPS");
    assert_eq!(template(Constant::Float(-0.0)).unwrap(), Template::Int(0));
    assert_eq!(template(Constant::Int(0)).unwrap(), Template::Int(0));
    for (constant, said) in [(Constant::Int(-5), "Int(-5)"), (Constant::Float(-0.5), "Float(-0.5)")]
    {
        let refused = template(constant).unwrap_err().to_string();
        assert_eq!(refused, format!("[scale] EPS must be none below zero but got {said}"));
    }
}

#[test]
fn a_call_knows_its_outputs_and_template_arguments() {
    let call = call(&[3, 5], &[5], Dtype::Int32).unwrap();
    let outputs = [
        OutputSpec { shape: vec![3, 5], dtype: Dtype::Float16 },
        OutputSpec { shape: vec![7], dtype: Dtype::Float32 },
    ];
    assert_eq!(call.outputs(), outputs);
    let template = [
        ("T", Template::Dtype(Dtype::Float16)),
        ("W", Template::Dtype(Dtype::Float32)),
        ("EPS", Template::Int(0x3f80_0000)),
        ("SCALED", Template::Bool(true)),
    ];
    assert_eq!(call.template(), template);
}

#[test]
fn shapes_must_agree() {
    assert_eq!(
        refusal(call(&[3, 5], &[6], Dtype::Int32)),
        "[scale] weight must have shape [5] but got [6]"
    );
    assert_eq!(
        refusal(call(&[3, 5, 1], &[5], Dtype::Int32)),
        "[scale] x must have shape [N, D] but got [3, 5, 1]"
    );
    assert_eq!(
        refusal(call(&[0, 5], &[5], Dtype::Int32)),
        "[scale] x must hold 1 to 2^31 elements but got [0, 5]"
    );
}

#[test]
fn too_many_elements_are_refused_before_they_exist() {
    let x = array(&[1], Dtype::Float16);
    let x = mlx_rs::ops::broadcast_to(&x, &[65536, 65536]).unwrap();
    let (weight, ids) = (array(&[65536], Dtype::Float32), array(&[2], Dtype::Int32));
    assert_eq!(
        refusal(Call::new(&SCALE, &[&x, &weight, &ids], plan())),
        "[scale] x must hold 1 to 2^31 elements but got [65536, 65536]"
    );
}

#[test]
fn dtypes_must_be_those_declared() {
    assert_eq!(
        refusal(call(&[3, 5], &[5], Dtype::Float32)),
        "[scale] ids must have dtype Int32 but got Float32"
    );
    let x = array(&[3, 5], Dtype::Int32);
    let call = Call::new(&SCALE, &[&x, &x, &x], plan());
    assert!(refusal(call).starts_with("[scale] x must have dtype Float32 or"));
}

#[test]
fn any_type_may_be_one_that_inputs_share() {
    static PAIR: Kernel = Kernel {
        inputs: &[Argument::any("E", "x", &["N"]), Argument::any("E", "y", &["N"])],
        outputs: &[Argument::any("E", "z", &["N"])],
        constants: &[],
        ..SCALE
    };
    let plan = || Plan { constants: vec![], extents: vec![], ..plan() };
    let (bytes, floats) = (array(&[3], Dtype::Uint8), array(&[3], Dtype::Float32));
    let call = Call::new(&PAIR, &[&bytes, &bytes], plan()).unwrap();
    assert_eq!(call.template(), [("E", Template::Dtype(Dtype::Uint8))]);
    assert_eq!(call.outputs(), [OutputSpec { shape: vec![3], dtype: Dtype::Uint8 }]);
    assert_eq!(
        refusal(Call::new(&PAIR, &[&bytes, &floats], plan())),
        "[scale] y must have dtype Uint8 but got Float32"
    );
}

#[test]
fn the_number_of_arrays_and_constants_must_be_right() {
    let x = array(&[3, 5], Dtype::Float32);
    assert_eq!(refusal(Call::new(&SCALE, &[&x], plan())), "[scale] inputs must number 3 but got 1");
    let (weight, ids) = (array(&[5], Dtype::Float32), array(&[2], Dtype::Int32));
    let bare = Plan { constants: vec![], ..plan() };
    assert_eq!(
        refusal(Call::new(&SCALE, &[&x, &weight, &ids], bare)),
        "[scale] constants must number 2 but got 0"
    );
    let unnamed = Plan { extents: vec![], ..plan() };
    assert_eq!(
        refusal(Call::new(&SCALE, &[&x, &weight, &ids], unnamed)),
        "[scale] sums must have axes that inputs or the plan name but got G"
    );
}

#[test]
fn a_launch_that_some_gpu_cannot_run_is_refused() {
    let (x, weight) = (array(&[3, 5], Dtype::Float32), array(&[5], Dtype::Float32));
    let ids = array(&[2], Dtype::Int32);
    let launch = Launch { threadgroup_bytes: 32769, ..plan().launch };
    let call = Call::new(&SCALE, &[&x, &weight, &ids], Plan { launch, ..plan() });
    assert_eq!(refusal(call), "[scale] threadgroup_bytes must be at most 32768 but got 32769");
}

#[test]
fn a_scalar_is_passed_as_one_element() {
    static ONE: Kernel =
        Kernel { inputs: &[Argument::of("T", "x", &["1"])], outputs: &[], constants: &[], ..SCALE };
    let plan = Plan { constants: vec![], ..plan() };
    let call = Call::new(&ONE, &[&Array::from_f32(1.0)], plan).unwrap();
    assert_eq!(call.inputs()[0].shape(), [1]);
}

#[test]
fn without_a_gpu_a_launch_is_an_error_that_names_the_kernel() {
    let call = call(&[3, 5], &[5], Dtype::Int32).unwrap();
    let run = mlx_rs::with_device(mlx_rs::Device::cpu(), || call.run());
    assert_eq!(
        run.unwrap_err().what(),
        "[scale] kernels run on a GPU, and the current stream is on the CPU"
    );
}

#[test]
fn a_kernel_that_writes_an_input_is_run_by_promise_alone() {
    static INCREMENT: Kernel = Kernel {
        name: "increment",
        inputs: &[Argument::of("T", "x", &["N"]).written()],
        outputs: &[Argument::of("T", "y", &["N"])],
        constants: &[],
        ..SCALE
    };
    let plan = Plan { constants: Vec::new(), extents: Vec::new(), ..plan() };
    let call = Call::new(&INCREMENT, &[&array(&[9], Dtype::Float32)], plan).unwrap();
    assert_eq!(call.run().unwrap_err().what(), "[increment] it writes an input");
}

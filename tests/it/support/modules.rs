//! What every module must do inside mlx-rs.

use std::rc::Rc;

use mlx_rs::{
    Array,
    module::{FlattenedModuleParam, Module, ModuleParameters, ModuleParametersExt, UnaryModule},
    nn,
    optimizers::{Optimizer, Sgd},
};

use super::{
    compare::{Tolerance, assert_close},
    tensor::Tensor,
};

/// Trains one step, checks that exactly `trainable` parameters moved, and round-trips safetensors.
pub(crate) fn assert_module<M>(mut module: M, input: &Array, trainable: &[&str])
where
    M: UnaryModule + ModuleParameters + Clone + 'static,
    for<'a> M: Module<&'a Array, Output = Array, Error = mlx_rs::error::Exception>,
{
    assert_names(&module, trainable);
    let before = flattened(&module);
    train_one_step(&mut module, input);
    for (name, array) in flattened(&module) {
        if !trainable.contains(&&*name) {
            let same = before[&name].all_close(&array, 0.0, 0.0, true).unwrap();
            assert!(same, "{name} moved, but is not to be trained");
        }
    }
    for name in trainable {
        let moved = before[*name].all_close(&flattened(&module)[*name], 0.0, 0.0, None).unwrap();
        assert!(!moved, "{name} did not train");
    }
    assert_survives_saving(&module, before, input);
    assert_fits_in_sequential(module, input);
}

fn assert_names<M: ModuleParameters>(module: &M, trainable: &[&str]) {
    let mut names: Vec<_> = module.trainable_parameters().flatten().into_keys().collect();
    names.sort();
    let mut expected: Vec<Rc<str>> = trainable.iter().map(|&name| name.into()).collect();
    expected.sort();
    assert_eq!(names, expected, "trainable parameters");
}

fn flattened<M: ModuleParameters>(module: &M) -> FlattenedModuleParam {
    let parameters = module.parameters().flatten();
    parameters.into_iter().map(|(name, array)| (name, array.clone())).collect()
}

fn train_one_step<M>(module: &mut M, input: &Array)
where
    M: ModuleParameters,
    for<'a> M: Module<&'a Array, Output = Array, Error = mlx_rs::error::Exception>,
{
    let loss = |module: &mut M, input: &Array| -> mlx_rs::error::Result<Array> {
        module.forward(input)?.square()?.sum(None)
    };
    let (_, gradients) = nn::value_and_grad(loss)(module, input).unwrap();
    Sgd::new(1e-2).update(module, gradients).unwrap();
}

fn assert_survives_saving<M>(module: &M, other: FlattenedModuleParam, input: &Array)
where
    M: ModuleParameters + Clone,
    for<'a> M: Module<&'a Array, Output = Array, Error = mlx_rs::error::Exception>,
{
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("module.safetensors");
    module.save_safetensors(&path).unwrap();
    let mut loaded = module.clone();
    loaded.update_flattened(other);
    loaded.load_safetensors(&path).unwrap();
    let expected = Tensor::of(&module.clone().forward(input).unwrap());
    let got = loaded.forward(input).unwrap();
    assert_close("after save and load", &got, &expected, Tolerance::EXACT);
}

fn assert_fits_in_sequential<M>(mut module: M, input: &Array)
where
    M: ModuleParameters + 'static,
    for<'a> M: Module<&'a Array, Output = Array, Error = mlx_rs::error::Exception>,
{
    let expected = Tensor::of(&module.forward(input).unwrap());
    let mut sequence = nn::Sequential::new().append(module);
    let got = sequence.forward(input).unwrap();
    assert_close("in Sequential", &got, &expected, Tolerance::EXACT);
    let count = sequence.trainable_parameters().flatten().len();
    let loss = |sequence: &mut nn::Sequential, input: &Array| -> mlx_rs::error::Result<Array> {
        sequence.forward(input)?.square()?.sum(None)
    };
    let (_, gradients) = nn::value_and_grad(loss)(&mut sequence, input).unwrap();
    assert_eq!(gradients.len(), count, "gradients through Sequential");
}

//! An activation as a module without parameters.

use mlx_rs::{
    Array,
    error::Exception,
    module::{Module, ModuleParamMut, ModuleParamRef, ModuleParameters},
};

use super::Activation;

// mlx-rs derives this for structs only.
impl ModuleParameters for Activation {
    fn num_parameters(&self) -> usize {
        0
    }

    fn parameters(&self) -> ModuleParamRef<'_> {
        ModuleParamRef::new()
    }

    fn parameters_mut(&mut self) -> ModuleParamMut<'_> {
        ModuleParamMut::new()
    }

    fn trainable_parameters(&self) -> ModuleParamRef<'_> {
        ModuleParamRef::new()
    }

    fn freeze_parameters(&mut self, _: bool) {}

    fn unfreeze_parameters(&mut self, _: bool) {}

    fn all_frozen(&self) -> Option<bool> {
        None
    }

    fn any_frozen(&self) -> Option<bool> {
        None
    }
}

impl Module<&Array> for Activation {
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        Ok(self.apply(x)?)
    }

    fn training_mode(&mut self, _: bool) {}
}

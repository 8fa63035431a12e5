//! A parameter that no optimizer reaches.

use std::rc::Rc;

use mlx_rs::{Array, module::Parameter, nested::NestedValue};

/// An array that a module saves and loads but never trains, not even when told to unfreeze.
///
/// It counts how often it was lent out for writing, so that whatever was derived from it can tell
/// when it may be stale.
#[derive(Debug, Clone)]
pub(super) struct Frozen {
    value: Array,
    loans: u64,
}

impl Frozen {
    pub(super) fn new(value: Array) -> Self {
        Self { value, loans: 0 }
    }

    pub(super) fn value(&self) -> &Array {
        &self.value
    }

    /// Grows whenever the value may have changed.
    pub(super) fn loans(&self) -> u64 {
        self.loans
    }
}

impl Parameter for Frozen {
    fn count(&self) -> usize {
        1
    }

    fn freeze(&mut self, _recursive: bool) {}

    fn unfreeze(&mut self, _recursive: bool) {}

    fn is_frozen(&self) -> Option<bool> {
        Some(true)
    }

    fn as_nested_value(&self) -> NestedValue<Rc<str>, &Array> {
        NestedValue::Value(&self.value)
    }

    fn as_nested_value_mut(&mut self) -> NestedValue<Rc<str>, &mut Array> {
        self.loans += 1;
        NestedValue::Value(&mut self.value)
    }

    fn as_trainable_nested_value(&self) -> Option<NestedValue<Rc<str>, &Array>> {
        None
    }
}

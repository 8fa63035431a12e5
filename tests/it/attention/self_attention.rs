//! A module of one array around attention, which takes three, so that it can be trained, saved and composed.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    macros::ModuleParameters,
    module::{Module, ModuleParameters, Param},
};

use crate::support::{modules::assert_module, sample::normal};

/// Attends from `[B, S, H, D]` to itself after one trainable factor.
#[derive(Debug, Clone, ModuleParameters)]
struct SelfAttention<A: ModuleParameters> {
    #[param]
    weight: Param<Array>,
    #[param]
    attention: A,
}

impl<A> Module<&Array> for SelfAttention<A>
where
    A: ModuleParameters + for<'a> Module<Three<'a>, Output = Array, Error = Exception>,
{
    type Output = Array;
    type Error = Exception;

    fn forward(&mut self, x: &Array) -> Result<Array, Exception> {
        let x = x.multiply(&*self.weight)?;
        self.attention.forward((&x, &x, &x))
    }

    fn training_mode(&mut self, _: bool) {}
}

/// Queries, keys and values.
type Three<'a> = (&'a Array, &'a Array, &'a Array);

/// What every module must do, of one with two heads of 8 elements, over `length` tokens.
pub(crate) fn assert_attention<A>(attention: A, length: i32)
where
    A: ModuleParameters + Clone + 'static,
    A: for<'a> Module<Three<'a>, Output = Array, Error = Exception>,
{
    let weight = Param::new(Array::from_f32(1.0));
    let input = normal(5, &[2, length, 2, 8], Dtype::Float32);
    assert_module(SelfAttention { weight, attention }, &input, &["weight"]);
}

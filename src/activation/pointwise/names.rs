//! The names activations go by in model files.

use std::{fmt, str::FromStr};

use super::Activation;
use crate::{
    check::Check,
    error::{Error, Result},
};

/// Other names in use. "gelu_fast" is the tanh form, as in the model files that say so.
const ALIASES: &[(&str, Activation)] = &[
    ("linear", Activation::Identity),
    ("none", Activation::Identity),
    ("relu2", Activation::ReluSquared),
    ("squared_relu", Activation::ReluSquared),
    ("leakyrelu", Activation::LeakyRelu),
    ("swish", Activation::Silu),
    ("gelu_exact", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_approximate", Activation::GeluTanh),
    ("gelu_approx", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_fast_approx", Activation::QuickGelu),
    ("hardsigmoid", Activation::HardSigmoid),
    ("hardswish", Activation::HardSwish),
];

impl Activation {
    /// Every activation.
    pub const ALL: &'static [Self] = &[
        Self::Identity,
        Self::Relu,
        Self::Relu6,
        Self::ReluSquared,
        Self::LeakyRelu,
        Self::Sigmoid,
        Self::Tanh,
        Self::Silu,
        Self::Gelu,
        Self::GeluTanh,
        Self::QuickGelu,
        Self::Mish,
        Self::Softplus,
        Self::HardSigmoid,
        Self::HardSwish,
    ];

    /// The name it prints, that of its function.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Relu => "relu",
            Self::Relu6 => "relu6",
            Self::ReluSquared => "relu_squared",
            Self::LeakyRelu => "leaky_relu",
            Self::Sigmoid => "sigmoid",
            Self::Tanh => "tanh",
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::QuickGelu => "quick_gelu",
            Self::Mish => "mish",
            Self::Softplus => "softplus",
            Self::HardSigmoid => "hard_sigmoid",
            Self::HardSwish => "hard_swish",
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Activation {
    type Err = Error;

    /// Parses a name, its own or another in use, in lower case.
    fn from_str(name: &str) -> Result<Self> {
        let own = Self::ALL.iter().copied().find(|activation| activation.name() == name);
        let alias = || ALIASES.iter().find(|(alias, _)| *alias == name);
        let meaning = own.or_else(|| alias().map(|&(_, activation)| activation));
        let names: Vec<_> = Self::ALL.iter().map(|activation| activation.name()).collect();
        let expected = format!("be one of {}, or an alias", names.join(", "));
        Check::op("Activation").known(meaning, "name", expected, format_args!("{name:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_parses_to_what_prints_it() {
        for activation in Activation::ALL {
            assert_eq!(activation.to_string().parse().ok(), Some(*activation));
        }
    }

    #[test]
    fn no_alias_hides_a_name_or_another_alias() {
        for (index, (alias, _)) in ALIASES.iter().enumerate() {
            assert!(Activation::ALL.iter().all(|activation| activation.name() != *alias));
            assert!(ALIASES[..index].iter().all(|(earlier, _)| earlier != alias), "{alias}");
        }
    }

    #[test]
    fn model_files_say_what_they_mean() {
        for (name, activation) in [
            ("swish", Activation::Silu),
            ("gelu", Activation::Gelu),
            ("gelu_new", Activation::GeluTanh),
            ("gelu_pytorch_tanh", Activation::GeluTanh),
            ("quick_gelu", Activation::QuickGelu),
            ("relu2", Activation::ReluSquared),
        ] {
            assert_eq!(name.parse().ok(), Some(activation), "{name}");
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let message = Activation::from_str("glue").map_err(|error| error.to_string());
        let message = message.err().unwrap_or_default();
        assert!(
            message.starts_with("[Activation] name must be one of identity, relu,"),
            "{message}"
        );
        assert!(message.ends_with("but got \"glue\""), "{message}");
    }
}

//! The environment, read once.

use std::{env, sync::OnceLock};

/// Thresholds that decide between backends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// The shortest sequence for which a scan takes its kernel on a GPU, on NVIDIA ones too, in elements
    /// along the scanned axis: 1 to 1024. `MLX_PRIMITIVES_MIN_SEQ_FOR_METAL` sets it. Default: 8.
    pub min_seq_for_metal: i32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { min_seq_for_metal: Self::DEFAULT_MIN_SEQ_FOR_METAL }
    }
}

impl Settings {
    /// The default of [`Settings::min_seq_for_metal`].
    pub const DEFAULT_MIN_SEQ_FOR_METAL: i32 = 8;

    /// What the environment said when the process first asked. A value that is no number from 1 to 1024
    /// is ignored, with a warning.
    pub fn current() -> &'static Self {
        static CURRENT: OnceLock<Settings> = OnceLock::new();
        CURRENT.get_or_init(|| Self::from_lookup(|name| env::var(name).ok()))
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        Self {
            min_seq_for_metal: lookup(MIN_SEQ_FOR_METAL)
                .and_then(|text| parse_length(&text))
                .unwrap_or(Self::DEFAULT_MIN_SEQ_FOR_METAL),
        }
    }
}

const MIN_SEQ_FOR_METAL: &str = "MLX_PRIMITIVES_MIN_SEQ_FOR_METAL";

fn parse_length(text: &str) -> Option<i32> {
    let length = text.trim().parse().ok().filter(|length| (1..=1024).contains(length));
    if length.is_none() {
        tracing::warn!("{MIN_SEQ_FOR_METAL} must be a whole number from 1 to 1024 but is {text:?}");
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    fn min_seq(value: Option<&str>) -> i32 {
        let named = |name: &str| name == "MLX_PRIMITIVES_MIN_SEQ_FOR_METAL";
        let lookup = |name: &str| value.filter(|_| named(name)).map(str::to_owned);
        Settings::from_lookup(lookup).min_seq_for_metal
    }

    #[test]
    fn the_environment_overrides_the_default() {
        assert_eq!(min_seq(None), 8);
        assert_eq!(min_seq(Some(" 64 ")), 64);
    }

    #[test]
    fn nonsense_in_the_environment_leaves_the_default() {
        for nonsense in ["", "0", "1025", "-3", "eight", "99999999999"] {
            assert_eq!(min_seq(Some(nonsense)), 8, "{nonsense:?}");
        }
    }
}

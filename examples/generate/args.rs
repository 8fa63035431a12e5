//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum, value_parser};

/// Writes text with a llama from a GGUF file.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// The model: a llama in a GGUF file
    #[arg(long, value_name = "PATH")]
    pub(crate) model: PathBuf,

    /// What to answer, or with --raw what to continue
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: String,

    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = value_parser!(u32).range(1..))]
    pub(crate) max_tokens: u32,

    /// Spread of the random choice; 0 always takes the likeliest token
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = temperature)]
    #[arg(allow_hyphen_values = true)]
    pub(crate) temperature: f32,

    /// Choose among the N likeliest tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) top_k: u32,

    /// Choose among the likeliest tokens that together reach this probability
    #[arg(long, value_name = "F", default_value_t = 1.0, value_parser = top_p)]
    #[arg(allow_hyphen_values = true)]
    pub(crate) top_p: f32,

    /// Choose among tokens at least this times as probable as the likeliest
    #[arg(long, value_name = "F", default_value_t = 0.0, value_parser = min_p)]
    #[arg(allow_hyphen_values = true)]
    pub(crate) min_p: f32,

    /// Start of the random choice: the same seed writes the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    pub(crate) raw: bool,

    /// Where to compute; a GPU where there is one, unless given
    #[arg(long)]
    pub(crate) device: Option<Device>,

    /// Print one JSON object instead of the text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    Cpu,
    Gpu,
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, "0 or more", |value| value >= 0.0)
}

fn top_p(text: &str) -> Result<f32, String> {
    number(text, "above 0 and at most 1", |value| value > 0.0 && value <= 1.0)
}

fn min_p(text: &str) -> Result<f32, String> {
    number(text, "from 0 to 1", |value| (0.0..=1.0).contains(&value))
}

/// A finite number for which `accepts` holds.
fn number(text: &str, range: &str, accepts: impl Fn(f32) -> bool) -> Result<f32, String> {
    let value = text.parse::<f32>().ok();
    let value = value.filter(|value| value.is_finite() && accepts(*value));
    value.ok_or_else(|| format!("must be a number {range}"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser, error::ErrorKind};

    use super::{Args, Device};

    fn parse(extra: &[&str]) -> Result<Args, clap::Error> {
        let args = ["generate", "--model", "m.gguf", "--prompt", "hi"];
        Args::try_parse_from(args.iter().chain(extra))
    }

    #[test]
    fn definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults_are_greedy() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.max_tokens, args.temperature, args.top_k), (128, 0.0, 0));
        assert_eq!((args.top_p, args.min_p, args.seed), (1.0, 0.0, 0));
        assert_eq!((args.raw, args.device, args.json), (false, None, false));
    }

    #[test]
    fn everything_can_be_set() {
        let flags = "--max-tokens 1 --temperature 0.7 --top-k 40 --top-p 1 --min-p 0.05 \
                     --seed 18446744073709551615 --raw --device cpu --json";
        let args = parse(&flags.split_whitespace().collect::<Vec<_>>()).unwrap();
        assert_eq!((args.max_tokens, args.temperature, args.top_k), (1, 0.7, 40));
        assert_eq!((args.top_p, args.min_p, args.seed), (1.0, 0.05, u64::MAX));
        assert_eq!((args.raw, args.device, args.json), (true, Some(Device::Cpu), true));
    }

    #[test]
    fn out_of_range_is_one_line_that_names_the_flag() {
        let cases = [
            ("--temperature", ["-0.1", "NaN", "inf", "1e39"]),
            ("--top-p", ["0", "-1", "1.01", "nan"]),
            ("--min-p", ["-0.01", "1.5", "NaN", "x"]),
            ("--max-tokens", ["0", "x", "1.5", "4294967296"]),
            ("--top-k", ["x", "1.5", "nan", "4294967296"]),
            ("--seed", ["x", "1.5", "nan", "18446744073709551616"]),
            ("--device", ["tpu", "", "CPU", "0"]),
        ];
        for (flag, values) in cases {
            for value in values {
                let error = parse(&[flag, value]).unwrap_err().to_string();
                let line = error.lines().next().unwrap();
                assert!(line.starts_with("error: ") && line.contains(flag), "{value}: {error}");
            }
        }
    }

    #[test]
    fn model_and_prompt_are_required() {
        let error = Args::try_parse_from(["generate"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
        assert!(error.to_string().contains("--model") && error.to_string().contains("--prompt"));
    }

    #[test]
    fn a_prompt_may_look_like_a_flag_or_be_empty() {
        for prompt in ["-- what?", "--json", ""] {
            let args = ["generate", "--model", "m.gguf", "--prompt", prompt];
            assert_eq!(Args::try_parse_from(args).unwrap().prompt, prompt);
        }
    }
}

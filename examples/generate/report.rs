//! What a run did, for people and for programs.

use std::time::Duration;

use serde::Serialize;

/// What the model wrote and what it took.
#[derive(Debug, Clone, Default)]
pub(crate) struct Generation {
    pub(crate) tokens: Vec<u32>,
    /// The natural logarithm of each token's probability, before temperature and filters.
    pub(crate) logprobs: Vec<f32>,
    /// From the prompt's first token to the first one written.
    pub(crate) prompt_time: Duration,
    /// From the first token written to the last.
    pub(crate) decode_time: Duration,
    pub(crate) peak_bytes: usize,
}

/// A finished run; its fields are the keys of the JSON object.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    text: String,
    prompt_tps: f64,
    decode_tps: f64,
    peak_bytes: usize,
    device: &'static str,
}

impl Report {
    pub(crate) fn new(
        prompt_tokens: Vec<u32>,
        generation: Generation,
        text: String,
        device: &'static str,
    ) -> Self {
        let Generation { tokens, logprobs, prompt_time, decode_time, .. } = generation;
        Self {
            prompt_tps: rate(prompt_tokens.len(), prompt_time),
            // The first token is the prompt's work.
            decode_tps: rate(tokens.len().saturating_sub(1), decode_time),
            prompt_tokens,
            tokens,
            logprobs: logprobs.into_iter().map(finite).collect(),
            text,
            peak_bytes: generation.peak_bytes,
            device,
        }
    }

    /// `prompt: 36 tokens, 90.1 tokens/s · generation: 128 tokens, 21.3 tokens/s · peak memory 0.61 GB`
    pub(crate) fn closing_line(&self) -> String {
        format!(
            "prompt: {}, {:.1} tokens/s · generation: {}, {:.1} tokens/s · peak memory {:.2} GB",
            tokens(self.prompt_tokens.len()),
            self.prompt_tps,
            tokens(self.tokens.len()),
            self.decode_tps,
            self.peak_bytes as f64 / 1e9,
        )
    }

    pub(crate) fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}

fn tokens(count: usize) -> String {
    format!("{count} token{}", if count == 1 { "" } else { "s" })
}

/// Tokens a second; none where no time passed.
fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// JSON has neither NaN nor infinities: they become the least logarithm there is.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { f32::MIN }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value;

    use super::{Generation, Report};

    fn generation() -> Generation {
        Generation {
            tokens: vec![5; 128],
            logprobs: vec![-0.5; 128],
            prompt_time: Duration::from_millis(400),
            decode_time: Duration::from_secs(10),
            peak_bytes: 612_000_000,
        }
    }

    #[test]
    fn closing_line_counts_and_rates() {
        let report = Report::new(vec![1; 36], generation(), String::new(), "cpu");
        assert_eq!(
            report.closing_line(),
            "prompt: 36 tokens, 90.0 tokens/s · generation: 128 tokens, 12.7 tokens/s · \
             peak memory 0.61 GB",
        );
    }

    #[test]
    fn json_has_every_field() {
        let text = "a \"quote\"\n🙂".to_owned();
        let json = Report::new(vec![1, 2], generation(), text.clone(), "cpu").json().unwrap();
        assert!(!json.contains('\n'), "one line");
        let json = serde_json::from_str::<Value>(&json).unwrap();
        assert_eq!(json["prompt_tokens"], serde_json::json!([1, 2]));
        assert_eq!(json["tokens"].as_array().unwrap().len(), 128);
        assert_eq!(json["logprobs"][0], -0.5);
        assert_eq!(json["text"], text);
        assert_eq!((&json["prompt_tps"], &json["decode_tps"]), (&5.0.into(), &12.7.into()));
        assert_eq!((&json["peak_bytes"], &json["device"]), (&612_000_000.into(), &"cpu".into()));
    }

    #[test]
    fn numbers_are_finite_whatever_happened() {
        let odd = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY, -1.0];
        for tokens in [vec![], vec![1], vec![1; 4]] {
            let logprobs = odd[..tokens.len()].to_vec();
            let generation = Generation { tokens, logprobs, ..Default::default() };
            let report = Report::new(Vec::new(), generation, String::new(), "cpu");
            let json = serde_json::from_str::<Value>(&report.json().unwrap()).unwrap();
            assert_eq!((&json["prompt_tps"], &json["decode_tps"]), (&0.0.into(), &0.0.into()));
            assert!(json["logprobs"].as_array().unwrap().iter().all(Value::is_number));
            assert!(!report.closing_line().contains("NaN"));
        }
    }

    #[test]
    fn one_token_is_singular() {
        let generation = Generation { tokens: vec![1], ..Default::default() };
        let line = Report::new(vec![1], generation, String::new(), "cpu").closing_line();
        assert!(line.starts_with("prompt: 1 token, 0.0 tokens/s · generation: 1 token,"), "{line}");
    }
}

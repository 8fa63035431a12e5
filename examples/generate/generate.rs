//! A prompt in, token after token out.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use mlx_primitives::generation::{
    FinishReason, GenerationEngine, GenerationEvent, GenerationRequest,
};
use mlx_rs::memory::peak_memory;

use crate::report::Generation;

/// Writes after the prompt; `emit` gets the text of each token once it is drawn.
pub(crate) fn generate(
    engine: &GenerationEngine,
    request: GenerationRequest,
    mut emit: impl FnMut(&str) -> Result<()>,
) -> Result<Generation> {
    let mut generation = Generation::default();
    let start = Instant::now();
    let mut first = start;
    for event in engine.submit(request)? {
        let token = match event {
            GenerationEvent::Token(token) => token,
            GenerationEvent::Finish(finish) => {
                emit(&finish.text)?;
                if let FinishReason::Failed(reason) = finish.reason {
                    bail!("{reason}");
                }
                continue;
            }
        };
        if generation.tokens.is_empty() {
            first = Instant::now();
            generation.prompt_time = first - start;
        }
        let logprob = token.log_probability;
        ensure!(!logprob.is_nan(), "the model's output is not a number: are its weights whole?");
        generation.tokens.push(token.token);
        generation.logprobs.push(logprob);
        generation.decode_time = first.elapsed();
        emit(&token.text)?;
    }
    generation.peak_bytes = peak_memory()?;
    Ok(generation)
}

#[cfg(test)]
mod tests {
    use mlx_primitives::{generation::GenerationEngineOptions, sampling::SamplingParams};

    use super::*;
    use crate::llama::{
        gguf::Checkpoint,
        model::Llama,
        testing::{fixtures, model_path},
    };

    fn engine() -> Option<GenerationEngine> {
        let model = Llama::load(&Checkpoint::open(&model_path()?).unwrap()).unwrap();
        let cache_bytes = GenerationEngineOptions::default().cache_bytes_for(&model, 512);
        let options = GenerationEngineOptions { cache_bytes, ..Default::default() };
        Some(GenerationEngine::new(model, options).unwrap())
    }

    fn write(engine: &GenerationEngine, prompt: &[u32], sampling: SamplingParams) -> Generation {
        let request = GenerationRequest { sampling, ..GenerationRequest::new(prompt.to_vec(), 24) };
        generate(engine, request, |_| Ok(())).unwrap()
    }

    fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..Default::default() }
    }

    #[test]
    fn the_real_model_writes_what_the_independent_one_wrote() {
        let Some(engine) = engine() else { return };
        for case in fixtures() {
            let written = write(&engine, &case.prompt_tokens, greedy());
            assert_eq!(written.tokens, case.tokens, "{:?}", case.prompt);
            let distance = written.logprobs.iter().zip(&case.logprobs).map(|(a, b)| (a - b).abs());
            let mean = distance.sum::<f32>() / case.logprobs.len() as f32;
            assert!(mean < 0.01, "{:?}: log-probabilities are {mean} away", case.prompt);
        }
    }

    #[test]
    fn a_stop_ends_the_text_and_is_no_part_of_it() {
        let Some(engine) = engine() else { return };
        let case = fixtures().swap_remove(0);
        let stop = case.tokens[5];
        let expected = case.tokens.split(|token| *token == stop).next().unwrap();
        let sampling = SamplingParams { stop_tokens: vec![stop], ..greedy() };
        assert_eq!(write(&engine, &case.prompt_tokens, sampling).tokens, expected);
    }

    #[test]
    fn a_seed_reproduces_a_text() {
        let Some(engine) = engine() else { return };
        let prompt = fixtures().swap_remove(0).prompt_tokens;
        let seeded = || SamplingParams { seed: 7, ..Default::default() };
        let first = write(&engine, &prompt, seeded());
        let again = write(&engine, &prompt, seeded());
        assert_eq!(first.tokens, again.tokens);
        assert_ne!(first.tokens, write(&engine, &prompt, greedy()).tokens);
    }
}

//! The loop: a prompt in, token after token out.

use std::time::Instant;

use anyhow::{Result, ensure};
use mlx_primitives::{
    cache::SimpleKvCache,
    sampling::{Sampler, token_log_probabilities},
};
use mlx_rs::{
    Array,
    memory::peak_memory,
    transforms::{async_eval, eval},
};

use crate::{model::Llama, report::Generation};

/// Longer prompts are read in parts, which bounds the memory of their attention scores.
const PROMPT_CHUNK: usize = 512;

/// What the model is asked to do.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) prompt: &'a [u32],
    pub(crate) max_tokens: usize,
    /// Tokens that end the text, and are not part of it.
    pub(crate) stops: &'a [u32],
}

/// Writes after the prompt until a stop or `max_tokens`; `emit` gets each token once it is chosen.
pub(crate) fn generate(
    model: &mut Llama,
    sampler: Sampler,
    request: &Request<'_>,
    mut emit: impl FnMut(u32) -> Result<()>,
) -> Result<Generation> {
    let mut writer = Writer { caches: model.caches(), model, sampler };
    let mut generation = Generation::default();
    let start = Instant::now();
    let mut step = writer.read(request.prompt)?;
    let mut first = start;
    while generation.tokens.len() < request.max_tokens {
        // The device works on the next token while this one is read and printed.
        let next = match request.max_tokens - generation.tokens.len() {
            1 => None,
            _ => Some(writer.follow(&step)?),
        };
        let (token, logprob) = step.value()?;
        if generation.tokens.is_empty() {
            first = Instant::now();
            generation.prompt_time = first - start;
        }
        if request.stops.contains(&token) {
            break;
        }
        generation.tokens.push(token);
        generation.logprobs.push(logprob);
        generation.decode_time = first.elapsed();
        emit(token)?;
        match next {
            Some(next) => step = next,
            None => break,
        }
    }
    generation.peak_bytes = peak_memory()?;
    Ok(generation)
}

struct Writer<'a> {
    model: &'a mut Llama,
    caches: Vec<SimpleKvCache>,
    sampler: Sampler,
}

/// A token being computed: `[1]` and `[1]`.
struct Step {
    token: Array,
    logprob: Array,
}

impl Writer<'_> {
    fn read(&mut self, prompt: &[u32]) -> Result<Step> {
        let mut chunks = prompt.chunks(PROMPT_CHUNK).peekable();
        loop {
            let chunk = chunks.next().unwrap_or_default();
            let ids = Array::from_slice(chunk, &[1, chunk.len() as i32]);
            let logits = self.model.next_logits(&ids, &mut self.caches)?;
            if chunks.peek().is_none() {
                return self.choose(&logits);
            }
            eval([&logits])?;
        }
    }

    fn follow(&mut self, step: &Step) -> Result<Step> {
        let ids = step.token.expand_dims(0)?;
        let logits = self.model.next_logits(&ids, &mut self.caches)?;
        self.choose(&logits)
    }

    fn choose(&mut self, logits: &Array) -> Result<Step> {
        let token = self.sampler.sample(logits)?;
        let logprob = token_log_probabilities(logits, &token)?;
        async_eval([&token, &logprob])?;
        Ok(Step { token, logprob })
    }
}

impl Step {
    fn value(&self) -> Result<(u32, f32)> {
        let logprob = self.logprob.try_item_cast::<f32>()?;
        ensure!(!logprob.is_nan(), "the model's output is not a number: are its weights whole?");
        Ok((self.token.try_item_cast::<u32>()?, logprob))
    }
}

#[cfg(test)]
mod tests {
    use mlx_primitives::sampling::SamplingOptions;

    use super::*;
    use crate::{
        gguf::Checkpoint,
        testing::{fixtures, model_path},
    };

    fn sampler(temperature: f32) -> Sampler {
        Sampler::new(SamplingOptions { temperature, ..Default::default() }, 7).unwrap()
    }

    fn write(model: &mut Llama, sampler: Sampler, prompt: &[u32], stops: &[u32]) -> Generation {
        let request = Request { prompt, max_tokens: 24, stops };
        let mut emitted = Vec::new();
        let emit = |token| {
            emitted.push(token);
            Ok(())
        };
        let generation = generate(model, sampler, &request, emit).unwrap();
        assert_eq!(emitted, generation.tokens);
        generation
    }

    #[test]
    fn the_real_model_writes_what_the_independent_one_wrote() {
        let Some(path) = model_path() else { return };
        let mut model = Llama::load(&Checkpoint::open(&path).unwrap()).unwrap();
        for case in fixtures() {
            let written = write(&mut model, sampler(0.0), &case.prompt_tokens, &[]);
            assert_eq!(written.tokens, case.tokens, "{:?}", case.prompt);
            let distance = written.logprobs.iter().zip(&case.logprobs).map(|(a, b)| (a - b).abs());
            let mean = distance.sum::<f32>() / case.logprobs.len() as f32;
            assert!(mean < 0.01, "{:?}: log-probabilities are {mean} away", case.prompt);
        }
    }

    #[test]
    fn a_stop_ends_the_text_and_is_no_part_of_it() {
        let Some(path) = model_path() else { return };
        let mut model = Llama::load(&Checkpoint::open(&path).unwrap()).unwrap();
        let case = fixtures().swap_remove(0);
        let stop = case.tokens[5];
        let expected = case.tokens.split(|token| *token == stop).next().unwrap();
        let written = write(&mut model, sampler(0.0), &case.prompt_tokens, &[stop]);
        assert_eq!(written.tokens, expected);
    }

    #[test]
    fn a_seed_reproduces_a_text() {
        let Some(path) = model_path() else { return };
        let mut model = Llama::load(&Checkpoint::open(&path).unwrap()).unwrap();
        let prompt = fixtures().swap_remove(0).prompt_tokens;
        let first = write(&mut model, sampler(1.0), &prompt, &[]);
        let again = write(&mut model, sampler(1.0), &prompt, &[]);
        assert_eq!(first.tokens, again.tokens);
        let greedy = write(&mut model, sampler(0.0), &prompt, &[]);
        assert_ne!(first.tokens, greedy.tokens);
    }
}

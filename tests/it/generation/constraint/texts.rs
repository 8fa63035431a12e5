//! What is drawn: of what is allowed, by the same odds, and by nobody else.

use mlx_primitives::{
    generation::{FinishReason, GenerationEngineOptions, GenerationRequest},
    sampling::{Dry, SamplingParams},
};

use super::{
    Decoder, Ruled, anything, cache_bytes, engine, options, params, prompt, request, third, thirds,
    together, under,
};

/// Ways to draw that are done in one pass, and others.
pub(super) fn samplings(seed: u64) -> SamplingParams {
    match seed % 6 {
        0 => params(seed, 0.0),
        1 => params(seed, 1.0),
        2 => SamplingParams { top_p: 0.8, top_k: 20, ..params(seed, 0.7) },
        3 => {
            SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.2, ..params(seed, 0.9) }
        }
        4 => SamplingParams { stop_tokens: vec![5, 6], min_tokens: 9, ..params(seed, 1.0) },
        _ => {
            let dry = Some(Dry { multiplier: 1.0, ..Default::default() });
            SamplingParams { dry, banned_tokens: vec![1, 2], ..params(seed, 1.2) }
        }
    }
}

fn requests(count: u64) -> Vec<GenerationRequest> {
    let request = |seed| {
        let length = [1, 5, 16, 17, 40][seed as usize % 5];
        request(prompt(seed, length), 6 + seed as usize % 9, samplings(seed))
    };
    (0..count).map(request).collect()
}

/// What the decoder writes by reading everything anew, where that ends by its length.
fn expected(request: &GenerationRequest) -> Vec<u32> {
    let open =
        |text: &[u32], token| third(text, token) && !request.sampling.stop_tokens.contains(&token);
    let sampling = &request.sampling;
    Decoder::new().written_within(&request.prompt, request.max_tokens, sampling, open)
}

#[test]
fn to_allow_everything_is_no_constraint() {
    let all = || Ruled::new(|_| Ok((anything(), true)));
    let free = requests(24);
    let bound = free.iter().map(|request| under(all(), request.clone())).collect::<Vec<_>>();
    let options = GenerationEngineOptions { max_batch_tokens: 24, ..options() };
    let free = together(&engine(options.clone()), &free);
    assert!(free.iter().any(|text| matches!(text.reason, FinishReason::StopToken(_))), "{free:?}");
    for (text, free) in together(&engine(options), &bound).iter().zip(&free) {
        assert_eq!((&text.tokens, &text.reason), (&free.tokens, &free.reason));
    }
}

#[test]
fn alone_together_in_chunks_and_after_waiting_a_text_is_the_same() {
    let requests = requests(12);
    let expected = requests.iter().map(expected).collect::<Vec<_>>();
    let bound = requests.iter().map(|request| under(thirds(), request.clone()));
    let bound = bound.collect::<Vec<_>>();
    let one = engine(options());
    for (request, expected) in bound.iter().zip(&expected) {
        let text = together(&one, std::slice::from_ref(request)).swap_remove(0);
        assert_eq!((&text.tokens, text.reason), (expected, FinishReason::Length));
    }
    let chunks = GenerationEngineOptions { max_batch_tokens: 24, max_prompt_chunk: 7, ..options() };
    for options in [options(), chunks] {
        let texts = together(&engine(options), &bound).into_iter().map(|text| text.tokens);
        assert_eq!(texts.collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_text_that_waits_goes_on_where_its_constraint_was() {
    let long = requests(12).into_iter().map(|request| {
        let prompt = request.prompt[..request.prompt.len().min(17)].to_vec();
        GenerationRequest { prompt, max_tokens: 40, ..request }
    });
    let long = long.collect::<Vec<_>>();
    let bound = long.iter().map(|request| under(thirds(), request.clone())).collect::<Vec<_>>();
    let engine = engine(GenerationEngineOptions { cache_bytes: cache_bytes(160), ..options() });
    let texts = together(&engine, &bound).into_iter().map(|text| text.tokens).collect::<Vec<_>>();
    assert_eq!(texts, long.iter().map(expected).collect::<Vec<_>>());
    assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
}

#[test]
fn each_text_of_a_request_has_a_constraint_of_its_own() {
    let four = GenerationRequest { n: 4, ..request(prompt(9, 21), 12, params(7, 1.0)) };
    let texts = engine(options()).generate(under(thirds(), four.clone())).unwrap();
    let texts = texts.into_iter().map(|text| text.tokens).collect::<Vec<_>>();
    let alone =
        (7..11).map(|seed| GenerationRequest { sampling: params(seed, 1.0), ..four.clone() });
    assert_eq!(texts, alone.map(|request| expected(&request)).collect::<Vec<_>>());
    assert!(texts[1..].iter().all(|text| *text != texts[0]), "{texts:?}");
}

#[test]
fn texts_without_a_constraint_do_not_notice_those_with_one() {
    let free = requests(16);
    let alone = together(&engine(options()), &free);
    let mixed = free.iter().flat_map(|free| [free.clone(), under(thirds(), free.clone())]);
    let mixed = together(&engine(options()), &mixed.collect::<Vec<_>>());
    for ((free, alone), pair) in free.iter().zip(&alone).zip(mixed.chunks(2)) {
        assert_eq!((&pair[0].tokens, &pair[0].reason), (&alone.tokens, &alone.reason), "{free:?}");
        assert_eq!(pair[1].tokens, expected(free), "{free:?}");
    }
}

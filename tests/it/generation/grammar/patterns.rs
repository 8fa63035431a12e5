//! Regular expressions and grammars.

use std::sync::Arc;

use mlx_primitives::{
    generation::{Completion, Constraint, FinishReason},
    sampling::SamplingParams,
};

use super::{END, all_texts, assert_plain, engine, free, grammars, greedy, under};

fn regex(regex: &str) -> Arc<dyn Constraint> {
    Arc::new(grammars().regex(regex).unwrap())
}

/// `count` texts under a constraint, of which every fourth is the likeliest.
fn texts(constraint: &Arc<dyn Constraint>, count: u64, max_tokens: usize) -> Vec<Completion> {
    let request = |seed| match under(constraint, free(seed, max_tokens)) {
        request if seed % 4 == 0 => greedy(request),
        request => request,
    };
    all_texts(&engine(32 * 512), &(0..count).map(request).collect::<Vec<_>>()).concat()
}

/// Takes a prefix off for which `of` says yes.
fn head(text: &str, of: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|char| !of(char)).unwrap_or(text.len()))
}

/// `[0-9]{3}-[a-z]{2,5}(é|日本)?`
fn is_code(text: &str) -> bool {
    let (digits, rest) = head(text, |char| char.is_ascii_digit());
    let Some(rest) = rest.strip_prefix('-') else { return false };
    let (letters, rest) = head(rest, |char| char.is_ascii_lowercase());
    digits.len() == 3 && (2..=5).contains(&letters.len()) && ["", "é", "日本"].contains(&rest)
}

/// `(true|null|-1)( (true|null|-1))*\.`
fn is_list(text: &str) -> bool {
    let words = text.strip_suffix('.');
    words.is_some_and(|text| text.split(' ').all(|word| ["true", "null", "-1"].contains(&word)))
}

#[test]
fn texts_match_their_regular_expression() {
    let codes = texts(&regex("[0-9]{3}-[a-z]{2,5}(é|日本)?"), 100, 40);
    let lists = texts(&regex(r"(true|null|-1)( (true|null|-1))*\."), 100, 400);
    for (texts, matches) in [(codes, is_code as fn(&str) -> bool), (lists, is_list)] {
        for text in &texts {
            // Text of which the model may say that it is whole, or which can only be.
            let whole = [FinishReason::StopToken(END), FinishReason::Complete];
            let cut = text.reason == FinishReason::Length && text.tokens.len() == 400;
            assert!(whole.contains(&text.reason) || cut, "{text:?}");
            assert_eq!(matches(&text.text), !cut, "{text:?}");
            assert_plain(text);
        }
        let whole = texts.iter().filter(|text| text.reason != FinishReason::Length).count();
        assert!(whole > 75, "{whole}");
    }
}

#[test]
fn what_may_end_or_go_on_ends_with_the_end_token() {
    let mut ends = 0;
    for text in texts(&regex("[ab]{3,}"), 60, 30) {
        assert!(text.tokens.len() >= 2 && text.text.chars().all(|char| "ab".contains(char)));
        match text.reason {
            FinishReason::StopToken(END) => {
                assert!(text.text.len() >= 3);
                ends += 1;
            }
            reason => assert_eq!((reason, text.tokens.len()), (FinishReason::Length, 30)),
        }
    }
    assert!(ends > 20, "{ends}");
}

#[test]
fn a_minimum_of_tokens_delays_the_end() {
    let engine = engine(32 * 512);
    let requests = (0..40).map(|seed| {
        let request = under(&regex("[ab]*"), free(seed, 30));
        let sampling = SamplingParams { min_tokens: 6, ..request.sampling };
        mlx_primitives::generation::GenerationRequest { sampling, ..request }
    });
    let texts = all_texts(&engine, &requests.collect::<Vec<_>>()).concat();
    assert!(texts.iter().all(|text| text.tokens.len() >= 6), "{texts:?}");
    assert!(texts.iter().any(|text| text.reason == FinishReason::StopToken(END)));
}

#[test]
fn nothing_may_be_all_that_is_allowed() {
    let text = texts(&regex(""), 1, 5).swap_remove(0);
    assert_eq!((text.tokens, text.reason), (vec![], FinishReason::Complete));
}

/// What a grammar of nested brackets allows, by counting.
fn is_nested(text: &str) -> bool {
    let mut depth = 0_i32;
    let open = text.char_indices().all(|(place, char)| {
        depth += match char {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        "()x".contains(char) && (depth > 0 || place + 1 == text.len())
    });
    open && depth == 0 && text.matches('x').count() >= 1
}

#[test]
fn texts_are_of_their_grammar() {
    let grammar: Arc<dyn Constraint> = Arc::new(
        grammars().lark("start: \"(\" inner \")\"\ninner: \"x\" | start | start start\n").unwrap(),
    );
    assert!(is_nested("((x)(x))") && !is_nested("(x)(x)") && !is_nested("((x)"));
    let texts = texts(&grammar, 60, 300);
    let whole = texts.iter().filter(|text| text.reason == FinishReason::Complete);
    assert!(whole.clone().all(|text| is_nested(&text.text)));
    assert!(whole.clone().any(|text| text.text.contains(")(")));
    assert!(whole.count() > 30);
}

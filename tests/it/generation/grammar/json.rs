//! Whatever the model wants to say, it is JSON of the schema.

use std::sync::Arc;

use mlx_primitives::{
    generation::{Completion, Constraint, FinishReason, GenerationRequest},
    sampling::SamplingParams,
};
use serde_json::Value;

use super::{all_texts, assert_plain, engine, free, grammars, greedy, under};

const SCHEMA: &str = r#"{
    "type": "object",
    "properties": {
        "kind": { "enum": ["circle", "tri\"angle", "日本é", null, 3] },
        "count": { "type": "integer", "minimum": -5, "maximum": 120 },
        "grid": {
            "type": "array", "minItems": 1, "maxItems": 3,
            "items": { "type": "array", "maxItems": 3, "items": { "type": "integer", "minimum": 0, "maximum": 9 } }
        },
        "name": { "type": "string", "maxLength": 8 },
        "flag": { "type": "boolean" }
    },
    "required": ["kind", "count", "grid"],
    "additionalProperties": false
}"#;

fn constraint() -> Arc<dyn Constraint> {
    Arc::new(grammars().json_schema(SCHEMA).unwrap())
}

/// The schema without spaces and line breaks between things.
fn tight() -> Arc<dyn Constraint> {
    let option = r#"{ "x-guidance": { "whitespace_flexible": false, "item_separator": ",", "key_separator": ":" },"#;
    Arc::new(grammars().json_schema(&SCHEMA.replacen('{', option, 1)).unwrap())
}

/// What the schema asks for, said once more.
fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str::<Value>(text) else { return false };
    let kinds = ["circle", "tri\"angle", "日本é"];
    let kind = |kind: &Value| match kind {
        Value::String(kind) => kinds.contains(&kind.as_str()),
        kind => kind.is_null() || kind.as_i64() == Some(3),
    };
    // `-0` is an integer, which serde_json reads as a float.
    let whole = |number: &Value| match number.as_f64() {
        Some(0.0) => Some(0),
        _ => number.as_i64(),
    };
    let within = |number: &Value, least: i64, most: i64| {
        whole(number).is_some_and(|number| (least..=most).contains(&number))
    };
    let row = |row: &Value| {
        row.as_array().is_some_and(|row| row.len() <= 3 && row.iter().all(|n| within(n, 0, 9)))
    };
    let grid = |grid: &Value| {
        grid.as_array().is_some_and(|rows| (1..=3).contains(&rows.len()) && rows.iter().all(row))
    };
    ["kind", "count", "grid"].iter().all(|key| object.contains_key(*key))
        && object.iter().all(|(key, value)| match key.as_str() {
            "kind" => kind(value),
            "count" => within(value, -5, 120),
            "grid" => grid(value),
            "name" => value.as_str().is_some_and(|name| name.chars().count() <= 8),
            "flag" => value.is_boolean(),
            _ => false,
        })
}

#[test]
fn the_check_finds_what_is_wrong() {
    let good = r#" {"kind": 3, "count": 120, "grid": [[]], "name": "日本語", "flag": true}"#;
    assert!(is_valid(good));
    for (one, other) in [
        ("3,", "4,"),
        ("120", "121"),
        ("120", "12.5"),
        ("[[]]", "[]"),
        ("[[]]", "[[10]]"),
        ("[[]]", "[[1,2,3,4]]"),
        ("\"count\": 120, ", ""),
        ("true", "1"),
        ("日本語", "123456789"),
        ("flag", "flog"),
        ("}", ""),
        ("}", "}}"),
    ] {
        assert!(!is_valid(&good.replacen(one, other, 1)), "{one} to {other}");
    }
}

fn assert_complete(text: &Completion) {
    assert_eq!(text.reason, FinishReason::Complete, "{text:?}");
    assert!(is_valid(&text.text), "{text:?}");
    assert_plain(text);
}

#[test]
fn every_text_of_five_hundred_is_of_the_schema() {
    let (engine, constraint) = (engine(32 * 512), constraint());
    let requests = (0..500).map(|seed| under(&constraint, free(seed, 400))).collect::<Vec<_>>();
    let texts = all_texts(&engine, &requests).concat();
    texts.iter().for_each(assert_complete);
    let with = |part: &str| texts.iter().filter(|text| text.text.contains(part)).count();
    for part in
        ["name", "flag", "circle", "tri\\\"angle", "日本é", "null", "-", "true", "false", " "]
    {
        assert!((5..495).contains(&with(part)), "{} have {part}", with(part));
    }
}

#[test]
fn the_likeliest_text_is_too() {
    let (engine, constraint) = (engine(32 * 512), tight());
    let requests = (0..64).map(|seed| greedy(under(&constraint, free(seed, 200))));
    let texts = all_texts(&engine, &requests.collect::<Vec<_>>()).concat();
    texts.iter().for_each(assert_complete);
    assert!(texts.iter().all(|text| !text.text.contains('\n')));
}

#[test]
fn several_texts_of_a_request_are_those_of_as_many() {
    let (engine, constraint) = (engine(32 * 512), constraint());
    let four = GenerationRequest { n: 4, ..under(&constraint, free(7, 400)) };
    let texts = engine.generate(four).unwrap();
    texts.iter().for_each(assert_complete);
    let each = (7..11).map(|seed| {
        let sampling = SamplingParams { seed, ..Default::default() };
        GenerationRequest { sampling, ..under(&constraint, free(7, 400)) }
    });
    assert_eq!(texts, all_texts(&engine, &each.collect::<Vec<_>>()).concat());
    assert!(texts[1..].iter().all(|text| text.tokens != texts[0].tokens));
}

#[test]
fn free_texts_beside_them_are_what_they_are_alone() {
    let (engine, constraint) = (engine(32 * 512), constraint());
    let alone = (0..24).map(|seed| engine.generate(free(seed, 60)).unwrap()).collect::<Vec<_>>();
    let requests = (0..24).flat_map(|seed| [free(seed, 60), under(&constraint, free(seed, 400))]);
    let texts = all_texts(&engine, &requests.collect::<Vec<_>>());
    for (pair, alone) in texts.chunks(2).zip(&alone) {
        assert_eq!(&pair[0], alone, "log-probabilities included");
        assert_complete(&pair[1][0]);
    }
}

#[test]
fn a_text_that_waits_in_between_is_the_same() {
    let constraint = constraint();
    let requests = (0..16).map(|seed| under(&constraint, free(seed, 400))).collect::<Vec<_>>();
    let (roomy, narrow) = (engine(32 * 512), engine(416));
    let texts = all_texts(&narrow, &requests);
    assert_eq!(texts, all_texts(&roomy, &requests));
    texts.concat().iter().for_each(assert_complete);
    assert!(narrow.stats().preemptions > 0, "{:?}", narrow.stats());
    assert_eq!(roomy.stats().preemptions, 0);
}

#[test]
fn a_text_that_is_cut_is_the_beginning_of_one() {
    let (engine, constraint) = (engine(32 * 512), constraint());
    let requests = (0..60).map(|seed| under(&constraint, free(seed, 1 + seed as usize % 14)));
    for text in all_texts(&engine, &requests.collect::<Vec<_>>()).concat() {
        assert_eq!(text.reason, FinishReason::Length, "{text:?}");
        let all = text.tokens.iter().flat_map(|&token| super::bytes(token)).collect::<Vec<_>>();
        assert!(serde_json::from_slice::<Value>(&all).unwrap_err().is_eof(), "{text:?}");
    }
}

#[test]
fn a_stop_string_ends_a_text_early() {
    let (engine, constraint) = (engine(32 * 512), constraint());
    for seed in 0..8 {
        let stop_strings = vec!["count".to_owned()];
        let request = GenerationRequest { stop_strings, ..under(&constraint, free(seed, 400)) };
        let text = engine.generate(request).unwrap().swap_remove(0);
        assert_eq!(text.reason, FinishReason::StopString("count".to_owned()));
        let whole = engine.generate(under(&constraint, free(seed, 400))).unwrap().swap_remove(0);
        assert_eq!(whole.text.split("count").next(), Some(text.text.as_str()));
    }
}

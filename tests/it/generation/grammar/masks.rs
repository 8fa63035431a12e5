//! What a grammar allows, step by step.

use mlx_primitives::generation::{Allowed, Constraint};

use super::{CONTROL, END, VOCABULARY, bytes, grammars};
use crate::support::sample::Random;

const SCHEMAS: [&str; 2] = [
    r#"{ "type": "array", "items": { "enum": ["é日本", true, null] }, "maxItems": 4 }"#,
    r#"{ "type": "object", "properties": { "name": { "type": "string", "maxLength": 5 } } }"#,
];

fn open(allowed: &Allowed) -> Vec<u32> {
    (0..VOCABULARY.unsigned_abs()).filter(|&token| allowed.tokens.allows(token)).collect()
}

/// A grammar that has accepted these tokens and no others.
fn after(schema: &str, tokens: &[u32]) -> Box<dyn Constraint> {
    let mut grammar = grammars().json_schema(schema).unwrap();
    tokens.iter().for_each(|&token| grammar.accept(token).unwrap());
    Box::new(grammar)
}

#[test]
fn tokens_without_bytes_are_no_part_of_a_text() {
    let mut random = Random::new(4);
    for schema in SCHEMAS {
        for _ in 0..20 {
            let mut grammar = grammars().json_schema(schema).unwrap();
            for _ in 0..60 {
                if grammar.is_complete() {
                    break;
                }
                let open = open(&grammar.allowed().unwrap());
                assert!(!open.is_empty() && open.iter().all(|token| *token < CONTROL), "{open:?}");
                grammar.accept(open[random.below(open.len())]).unwrap();
            }
        }
    }
}

#[test]
fn equal_tokens_are_allowed_alike() {
    let allowed = grammars().regex("true").unwrap().allowed().unwrap();
    let expected = (0..CONTROL).filter(|&id| {
        let bytes = bytes(id);
        "true".as_bytes().starts_with(&bytes)
    });
    let expected = expected.collect::<Vec<_>>();
    assert_eq!(open(&allowed), expected);
    let whole = expected.iter().filter(|&&id| bytes(id) == b"true").count();
    assert_eq!((whole, allowed.end), (2, false));
}

#[test]
fn a_fork_stays_where_it_was_taken() {
    let mut random = Random::new(5);
    let mut completed = 0;
    for round in 0..60 {
        let schema = SCHEMAS[round % 2];
        let (mut grammar, mut tokens) = (after(schema, &[]).fork(), Vec::new());
        let mut forks = vec![grammar.fork()];
        for _ in 0..30 {
            if grammar.is_complete() {
                completed += 1;
                let allowed = grammar.allowed().unwrap();
                assert!(allowed.end && open(&allowed).is_empty());
            }
            if grammar.is_complete() || random.below(4) == 0 {
                tokens.truncate(random.below(tokens.len().max(1)));
                forks.truncate(1 + tokens.len());
                grammar = forks[tokens.len()].fork();
                let mut fresh = after(schema, &tokens);
                assert_eq!(grammar.allowed().unwrap(), fresh.allowed().unwrap(), "{tokens:?}");
                assert_eq!(grammar.is_complete(), fresh.is_complete());
            }
            let open = open(&grammar.allowed().unwrap());
            let token = open[random.below(open.len())];
            grammar.accept(token).unwrap();
            tokens.push(token);
            forks.push(grammar.fork());
        }
    }
    assert!(completed > 5, "{completed}");
}

#[test]
fn a_fork_goes_its_own_way() {
    let mut one = grammars().regex("(true|null)x").unwrap();
    let mut other = one.fork();
    one.accept(b't'.into()).unwrap();
    other.accept(b'n'.into()).unwrap();
    let mut third = one.fork();
    assert_eq!(third.allowed().unwrap(), one.allowed().unwrap());
    // What one does wrong is its own.
    assert!(third.accept(b'!'.into()).is_err() && third.allowed().is_err());
    assert!(!third.is_complete());
    for (constraint, rest) in [(&mut one as &mut dyn Constraint, "ruex"), (&mut *other, "ullx")] {
        for byte in rest.bytes() {
            assert!(!constraint.is_complete());
            assert_eq!(open(&constraint.allowed().unwrap())[0], u32::from(byte));
            constraint.accept(byte.into()).unwrap();
        }
        assert!(constraint.is_complete());
        assert!(constraint.accept(b'x'.into()).is_err());
    }
}

#[test]
fn the_end_token_is_told_and_no_part_of_a_mask() {
    let mut grammar = grammars().regex("a*").unwrap();
    assert_eq!(grammar.stop_tokens(), [END]);
    let allowed = grammar.allowed().unwrap();
    assert_eq!((open(&allowed), allowed.end), (vec![b'a'.into()], true));
}

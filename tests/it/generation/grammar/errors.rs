//! Grammars that cannot be, and vocabularies.

use std::sync::Arc;

use mlx_primitives::generation::Grammars;

use super::{END, VOCABULARY, bytes, engine, free, grammars, under};

#[test]
fn a_wrong_schema_regex_or_grammar_is_refused_with_a_reason() {
    let grammars = grammars();
    let schema = |schema: &str| grammars.json_schema(schema).unwrap_err().to_string();
    let start = "[Grammars] json_schema must be one that llguidance can take but got ";
    for (wrong, reason) in [
        ("{", "EOF"),
        (r#"{ "type": 5 }"#, "type"),
        (r#"{ "type": "integer", "minimum": 3, "maximum": 2 }"#, "minimum"),
        (r##"{ "$ref": "#/nowhere" }"##, "nowhere"),
        (r#"{ "type": "string", "pattern": "(" }"#, "("),
    ] {
        let error = schema(wrong);
        assert!(error.starts_with(start) && error[start.len()..].contains(reason), "{error}");
        assert!(!error.contains("verbose") && !error.ends_with('\n'), "{error}");
    }
    let error = grammars.regex("a(").unwrap_err().to_string();
    assert!(error.starts_with("[Grammars] regex must be one that llguidance can take but got "));
    assert!(error.contains("unclosed"), "{error}");
    let error = grammars.lark("start: nothing").unwrap_err().to_string();
    assert!(error.starts_with("[Grammars] lark must be one"), "{error}");
    assert!(error.contains("nothing"), "{error}");
}

#[test]
fn a_vocabulary_that_cannot_be_is_refused() {
    let refusal = |vocabulary, stops: &[u32]| {
        Grammars::new(&bytes, vocabulary, stops).unwrap_err().to_string()
    };
    let expected = "[Grammars] vocabulary must be from 1 to 2^20 but got ";
    assert_eq!(refusal(0, &[]), format!("{expected}0"));
    assert_eq!(refusal((1 << 20) + 1, &[]), format!("{expected}1048577"));
    let expected = format!("[Grammars] stop_tokens must hold ids below {VOCABULARY} but got 999");
    assert_eq!(refusal(VOCABULARY, &[END, 999]), expected);
    let long = |token: u32| vec![b'a'; 400 * token as usize];
    assert_eq!(
        Grammars::new(&long, 4, &[]).unwrap_err().to_string(),
        "[Grammars] detokenizer must have at most 1000 bytes a token but got 1200"
    );
    assert!(Grammars::new(&long, 3, &[]).unwrap().regex("a*").is_ok());
    // More bytes in all than there may be.
    let many = |token: u32| [token.to_be_bytes(); 225].concat();
    let error = Grammars::new(&many, 6000, &[]).unwrap_err().to_string();
    assert!(error.starts_with("[Grammars] detokenizer must be one that llguidance can take but"));
}

#[test]
fn an_engine_refuses_grammars_of_another_vocabulary() {
    let other = Grammars::new(&bytes, VOCABULARY - 1, &[]).unwrap();
    let constraint: Arc<dyn mlx_primitives::generation::Constraint> =
        Arc::new(other.regex("a").unwrap());
    let error = engine(512).submit(under(&constraint, free(1, 5))).unwrap_err().to_string();
    let expected = format!("constraint must be of {VOCABULARY} tokens but got {}", VOCABULARY - 1);
    assert_eq!(error, format!("[GenerationRequest] {expected}"));
}

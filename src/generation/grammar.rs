//! JSON schemas, regular expressions and grammars as constraints.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};

use super::{
    constraint::{Allowed, Constraint, ConstraintError},
    panicked::message,
    text::Detokenizer,
};
use crate::{
    check::Check,
    error::Result,
    sampling::{MAX_VOCABULARY, TokenMask},
};

const CHECK: Check = Check::op("Grammars");
/// The most bytes of a token that llguidance's tree of tokens holds.
const MAX_BYTES: usize = 1000;
const TAKEN: &str = "be one that llguidance can take";
/// What llguidance adds to an error where it is asked for few words.
const FEW_WORDS: &str = "\n<non-verbose/>";

/// Makes [`Grammar`]s for one vocabulary, whose tokens it puts into order once.
///
/// What a text is made of is the bytes of its tokens. A token without any is none of it, so a control token is never
/// drawn, but to end the text.
///
/// It needs the feature `llguidance`, and what is and is not understood is what the crate of this name documents.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use mlx_primitives::generation::{Constraint, GenerationRequest, Grammars};
///
/// // A byte each, and one that ends texts.
/// let bytes = |token: u32| u8::try_from(token).map(|byte| vec![byte]).unwrap_or_default();
/// let grammars = Grammars::new(&bytes, 257, &[256])?;
/// let schema = r#"{ "type": "object", "properties": { "n": { "enum": [1, 2] } }, "required": ["n"] }"#;
/// let grammar = grammars.json_schema(schema)?;
/// let request = GenerationRequest {
///     constraint: Some(Arc::new(grammar)),
///     ..GenerationRequest::new(vec![1, 2], 100)
/// };
///
/// let mut code = grammars.regex("[0-9]{3}-[a-z]+")?;
/// "123-a".bytes().try_for_each(|byte| code.accept(byte.into()))?;
/// let next = code.allowed()?;
/// assert!(next.end && next.tokens.allows(b'z'.into()) && !next.tokens.allows(b'1'.into()));
/// assert!(grammars.regex("(").is_err());
/// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
/// ```
pub struct Grammars {
    parsers: ParserFactory,
    vocabulary: i32,
    stop_tokens: Arc<[u32]>,
}

impl Grammars {
    /// For the ids below `vocabulary`, which is the model's, and texts that end with one of `stop_tokens`.
    ///
    /// # Errors
    /// When `vocabulary` is not from 1 to 2^20, when a stop token is not below it, when a token has more than 1000 bytes, or
    /// when all have more than llguidance can take, some millions.
    pub fn new(
        detokenizer: &dyn Detokenizer,
        vocabulary: i32,
        stop_tokens: &[u32],
    ) -> Result<Self> {
        let known = (1..=MAX_VOCABULARY).contains(&vocabulary);
        CHECK.value(known, "vocabulary", "be from 1 to 2^20", vocabulary)?;
        let size = vocabulary.unsigned_abs();
        let expected = format_args!("hold ids below {size}");
        let unknown = stop_tokens.iter().find(|&&token| token >= size);
        unknown.map_or(Ok(()), |id| CHECK.value(false, "stop_tokens", expected, id))?;
        let mut words = (0..size).map(|token| detokenizer.bytes(token)).collect::<Vec<_>>();
        stop_tokens.iter().for_each(|&token| words[token as usize].clear());
        let longest = words.iter().map(Vec::len).max().unwrap_or_default();
        let expected = format_args!("have at most {MAX_BYTES} bytes a token");
        CHECK.value(longest <= MAX_BYTES, "detokenizer", expected, longest)?;
        // It asserts what it can take.
        let parsers = match catch_unwind(AssertUnwindSafe(|| parsers(words))) {
            Ok(parsers) => parsers.map_err(|why| why.to_string()),
            Err(panic) => Err(message(&*panic).to_owned()),
        };
        let parsers = match parsers {
            Ok(parsers) => parsers,
            Err(why) => CHECK.known(None, "detokenizer", TAKEN, why)?,
        };
        Ok(Self { parsers, vocabulary, stop_tokens: stop_tokens.into() })
    }

    /// Texts of JSON that a schema allows, and nothing before or after.
    ///
    /// # Errors
    /// When it is no JSON, no schema, or one that llguidance cannot take.
    pub fn json_schema(&self, schema: &str) -> Result<Grammar> {
        self.grammar("json_schema", schema)
    }

    /// Texts that a regular expression matches as a whole, in the syntax of the crate `regex`.
    ///
    /// # Errors
    /// When it is none, or one that llguidance cannot take.
    pub fn regex(&self, regex: &str) -> Result<Grammar> {
        self.grammar("regex", regex)
    }

    /// Texts of a context-free grammar, in llguidance's variant of Lark's syntax.
    ///
    /// # Errors
    /// When it is none, or one that llguidance cannot take.
    pub fn lark(&self, grammar: &str) -> Result<Grammar> {
        self.grammar("lark", grammar)
    }

    fn grammar(&self, tag: &'static str, text: &str) -> Result<Grammar> {
        let parser = TopLevelGrammar::from_tagged_str(tag, text)
            .and_then(|grammar| self.parsers.create_parser(grammar));
        let matcher = Matcher::new(parser);
        let wrong = matcher.get_error();
        wrong.map_or(Ok(()), |why| CHECK.value(false, tag, TAKEN, why.trim_end()))?;
        Ok(Grammar { matcher, vocabulary: self.vocabulary, stop_tokens: self.stop_tokens.clone() })
    }
}

/// What parses texts of these words: one more, of no bytes, is their end, so that no token of the model has to be.
fn parsers(mut words: Vec<Vec<u8>>) -> Result<ParserFactory, ConstraintError> {
    let end = words.len() as u32;
    words.push(Vec::new());
    let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
    let words: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let slices = SlicedBiasComputer::general_slices();
    let mut parsers = ParserFactory::new(&words, InferenceCapabilities::default(), &slices)?;
    parsers.quiet().limits_mut().verbose_errors = false;
    Ok(parsers)
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

/// A [`Constraint`] that [`Grammars`] made. To clone it is cheap, next to making it.
pub struct Grammar {
    matcher: Matcher,
    vocabulary: i32,
    stop_tokens: Arc<[u32]>,
}

impl Clone for Grammar {
    /// The two share nothing that changes: what goes wrong with one text is not to be met by another.
    fn clone(&self) -> Self {
        let (matcher, stop_tokens) = (self.matcher.deep_clone(), self.stop_tokens.clone());
        Self { matcher, vocabulary: self.vocabulary, stop_tokens }
    }
}

impl Constraint for Grammar {
    fn vocabulary(&self) -> i32 {
        self.vocabulary
    }

    fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(Allowed { tokens: TokenMask::none(self.vocabulary)?, end: true });
        }
        let words = Vec::from(self.matcher.compute_mask().map_err(said)?);
        let end = self.matcher.is_accepting().map_err(said)?;
        Ok(Allowed { tokens: TokenMask::from_words(self.vocabulary, words)?, end })
    }

    fn accept(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.matcher.consume_token(token).map_err(said)
    }

    fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("vocabulary", &self.vocabulary).finish_non_exhaustive()
    }
}

/// What an error says, without what llguidance adds for its developers.
fn said(error: impl fmt::Display) -> ConstraintError {
    error.to_string().trim_end_matches(FEW_WORDS).into()
}

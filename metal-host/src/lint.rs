//! The rules that kernels keep so that one text compiles for every target without being rewritten.

use crate::{
    error::{Error, Result},
    place::{self, Place},
    source::Source,
};

/// Words of C++ that Metal's language does not have, though clang would take them.
const FOREIGN: [&str; 15] = [
    "asm",
    "catch",
    "delete",
    "double",
    "dynamic_cast",
    "goto",
    "new",
    "static",
    "std",
    "thread_local",
    "throw",
    "try",
    "typeid",
    "virtual",
    "wchar_t",
];

/// Checks every rule on the text of `source`.
pub(crate) fn check(source: &Source) -> Result<()> {
    let header = tokens(&source.header, &source.name);
    let body = tokens(&source.body, &source.name);
    let broken = [(&header, false), (&body, true)].into_iter().find_map(|(tokens, is_body)| {
        (0..tokens.len()).find_map(|at| {
            let message = broken_rule(tokens, at, is_body)?;
            Some((tokens[at].place.clone(), message))
        })
    });
    match broken {
        None => Ok(()),
        Some((place, message)) => Err(Error::Rule { kernel: source.name.clone(), place, message }),
    }
}

fn broken_rule(tokens: &[Token], at: usize, is_body: bool) -> Option<String> {
    let rest = &tokens[at + 1..];
    match tokens[at].text.as_str() {
        word if FOREIGN.contains(&word) => {
            Some(format!("Metal's language has no `{word}` that a kernel could use"))
        }
        "threadgroup" => threadgroup_variable(rest).map(|name| {
            format!("threadgroup arrays are declared by THREADGROUP_ARRAY(T, {name}, [n])")
        }),
        "THREADGROUP_ARRAY" | "LARGE_THREADGROUP_ARRAY" if !is_body => Some(
            "threadgroup arrays are declared in the kernel's body and passed to helpers".to_owned(),
        ),
        "THREADGROUP_ARRAY" | "LARGE_THREADGROUP_ARRAY" if shares_a_large_array(tokens, at) => {
            Some("a large threadgroup array is the only one of its kernel".to_owned())
        }
        "vec" if is_constructed(rest) => {
            let why = "here vec<T, n>(v) would reinterpret the bits of v";
            Some(format!("a vector of T is made by MAKE_VEC(T, n)(..): {why}"))
        }
        _ => None,
    }
}

/// Whether two arrays are declared up to here, one of them large: where the launch gives that its size, both would begin at
/// one place.
fn shares_a_large_array(tokens: &[Token], at: usize) -> bool {
    let words = tokens[..=at].iter().map(|token| token.text.as_str());
    let arrays = words.filter(|word| word.ends_with("THREADGROUP_ARRAY")).collect::<Vec<_>>();
    arrays.len() > 1 && arrays.contains(&"LARGE_THREADGROUP_ARRAY")
}

/// The name of the variable that `threadgroup` declares; none where it qualifies a pointer or reference.
fn threadgroup_variable(rest: &[Token]) -> Option<&str> {
    let mut depth = 0;
    let mut name = None;
    for token in rest {
        match token.text.as_str() {
            "<" => depth += 1,
            ">" => depth -= 1,
            _ if depth > 0 => {}
            "[" | ";" | "=" => return name,
            text if text.starts_with(is_word) => name = Some(text),
            ":" => {}
            _ => return None,
        }
    }
    None
}

/// Whether what follows `vec` is `<...>(` or `<...>{`.
fn is_constructed(rest: &[Token]) -> bool {
    let mut depth = 0;
    for token in rest {
        match token.text.as_str() {
            "<" => depth += 1,
            ">" => depth -= 1,
            text if depth == 0 => return text == "(" || text == "{",
            _ => {}
        }
    }
    false
}

struct Token {
    text: String,
    place: Place,
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Words and punctuation, each with its line; comments and the preprocessor's lines are left out.
fn tokens(text: &str, name: &str) -> Vec<Token> {
    let mut place = Place { file: name.to_owned(), line: 0 };
    let mut tokens = Vec::new();
    let mut continued = false;
    for line in without_comments(text).lines() {
        place.line += 1;
        if let Some(said) = place::directive(line) {
            place = Place { line: said.line.saturating_sub(1), ..said };
        } else if !continued && !line.trim_start().starts_with('#') {
            let words = words(line);
            tokens.extend(words.map(|text| Token { text: text.to_owned(), place: place.clone() }));
        }
        let directive = continued || line.trim_start().starts_with('#');
        continued = directive && line.ends_with('\\');
    }
    tokens
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = line;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let first = rest.chars().next()?;
        let length = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let (word, after) = rest.split_at(length);
        rest = after;
        Some(word)
    })
}

/// `text` with every comment blank and its lines where they were.
fn without_comments(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    let starts = |rest: &str, at: usize| matches!(rest.as_bytes().get(at + 1), Some(b'/' | b'*'));
    while let Some((start, _)) = rest.match_indices('/').find(|&(at, _)| starts(rest, at)) {
        kept += &rest[..start];
        let comment = &rest[start..];
        let is_line = comment.starts_with("//");
        let end = if is_line { comment.find('\n') } else { comment.find("*/").map(|end| end + 2) };
        let (comment, after) = comment.split_at(end.unwrap_or(comment.len()));
        kept.extend(comment.chars().filter(|&c| c == '\n'));
        rest = after;
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The line and message of the first rule broken.
    fn broken(header: &str, body: &str) -> Option<(String, String)> {
        let source = Source {
            name: "k".into(),
            header: header.into(),
            body: body.into(),
            ..Source::default()
        };
        match check(&source) {
            Err(Error::Rule { place, message, .. }) => Some((place.to_string(), message)),
            _ => None,
        }
    }

    #[test]
    fn threadgroup_variables_need_the_macro() {
        for body in [
            "threadgroup float a[32];",
            "threadgroup metal::vec<T, 4> a[N][2];",
            "threadgroup float a;",
            "threadgroup float a[2] = {1, 2};",
        ] {
            let (place, message) = broken("", &format!("\n{body}")).unwrap_or_default();
            assert_eq!(place, "k:2", "{body}");
            assert!(message.contains("THREADGROUP_ARRAY(T, a, [n])"), "{message}");
        }
    }

    #[test]
    fn other_uses_of_threadgroup_are_free() {
        for text in [
            "threadgroup float* p = q;",
            "f((threadgroup vec<float, 4>*)p, 1);",
            "auto p = reinterpret_cast<const threadgroup float*>(q);",
            "void f(threadgroup float& a, threadgroup const T* b);",
            "#define X(T, name, extents) threadgroup T name extents",
            "#define X(a) \\\n  threadgroup T a[3];\n",
            "// threadgroup float a[3];",
            "/* threadgroup\n float a[3]; */",
            "threadgroup_barrier(mem_flags::mem_threadgroup);",
            "THREADGROUP_ARRAY(float, a, [3]);",
        ] {
            assert_eq!(broken("", text), None, "{text}");
        }
    }

    #[test]
    fn helpers_declare_no_threadgroup_arrays() {
        let text = "#line 7 \"a.metal\"\nTHREADGROUP_ARRAY(float, a, [3]);";
        let (place, message) = broken(text, "").unwrap_or_default();
        assert_eq!(place, "a.metal:7");
        assert!(message.contains("in the kernel's body"), "{message}");
    }

    #[test]
    fn a_large_threadgroup_array_is_alone() {
        let [large, other] = ["LARGE_THREADGROUP_ARRAY", "THREADGROUP_ARRAY"]
            .map(|word| format!("{word}(float, a, [3]);\n"));
        assert_eq!(broken("", &large), None);
        assert_eq!(broken("", &(other.clone() + &other)), None);
        for two in [large.clone() + &other, other + &large, large.clone() + &large] {
            let (place, message) = broken("", &two).unwrap_or_default();
            assert_eq!(place, "k:2", "{two}");
            assert!(message.contains("the only one"), "{message}");
        }
    }

    #[test]
    fn vectors_of_a_parameter_need_the_macro() {
        assert!(broken("", "auto v = vec<T, 4>(x);").is_some());
        assert!(broken("", "auto v = metal::vec<float, 2>{1, 2};").is_some());
        assert_eq!(broken("", "using T4 = vec<T, 4>; T4 v = *(const device vec<T, 4>*)p;"), None);
    }

    #[test]
    fn words_of_other_languages_are_refused() {
        let (place, message) =
            broken("", "float x;\n\ndouble y = std::exp(x);").unwrap_or_default();
        assert_eq!((place.as_str(), message.contains("`double`")), ("k:3", true));
        assert_eq!(broken("", "float newer = doubled; /* double */ // static"), None);
        assert_eq!(broken("", "x = static_cast<float>(y);"), None);
    }
}

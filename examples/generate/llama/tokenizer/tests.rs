use super::Tokenizer;
use crate::llama::{
    gguf::synthetic::{File, flag, integer, integers, text, texts, tokenizer},
    testing::{Random, model_tokenizer},
};

fn load(file: &File) -> Result<Tokenizer, String> {
    Tokenizer::new(&file.metadata()).map_err(|error| format!("{error:#}"))
}

/// The error after `change`.
#[track_caller]
fn refused(change: impl FnOnce(&mut File)) -> String {
    let mut file = tokenizer();
    change(&mut file);
    load(&file).err().unwrap()
}

fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    let bytes = tokens.iter().flat_map(|token| tokenizer.bytes(*token));
    String::from_utf8(bytes.copied().collect()).unwrap()
}

#[test]
fn merges_digits_and_special_tokens() {
    let tokenizer = load(&tokenizer()).unwrap();
    // a b ab Ġ 1 2 12 <|im_start|> <|im_end|> <user>
    assert_eq!(tokenizer.encode("ab ab").unwrap(), [2, 3, 2]);
    assert_eq!(tokenizer.encode("12").unwrap(), [4, 5], "digits stand alone");
    assert_eq!(tokenizer.encode("<|im_start|>a<|im_end|>").unwrap(), [7, 0, 8]);
    assert_eq!(tokenizer.encode("a<user>b").unwrap(), [0, 9, 1]);
    assert_eq!(tokenizer.encode("").unwrap(), [0; 0]);
}

#[test]
fn gpt2_keeps_digits_together() {
    let mut file = tokenizer();
    file.set("tokenizer.ggml.pre", text("gpt-2"));
    assert_eq!(load(&file).unwrap().encode("12").unwrap(), [6]);
}

#[test]
fn only_control_tokens_are_silent() {
    let tokenizer = load(&tokenizer()).unwrap();
    assert_eq!(decode(&tokenizer, &[7, 2, 3, 6, 9, 8]), "ab 12<user>");
    assert_eq!(tokenizer.bytes(u32::MAX), b"");
}

#[test]
fn ends_come_from_metadata_and_from_names() {
    let mut file = tokenizer();
    assert_eq!(load(&file).unwrap().stops(), [8]);
    file.set("tokenizer.ggml.eos_token_id", integer(0));
    file.set("tokenizer.ggml.eot_token_id", integer(1));
    let tokenizer = load(&file).unwrap();
    assert_eq!(tokenizer.stops(), [0, 1, 8]);
    assert_eq!((tokenizer.begin_text(), tokenizer.end_text()), ("<|im_start|>", "a"));
}

#[test]
fn a_lead_is_asked_for() {
    let mut file = tokenizer();
    assert_eq!(load(&file).unwrap().lead(), None);
    file.set("tokenizer.ggml.add_bos_token", flag(true));
    assert_eq!(load(&file).unwrap().lead(), Some(7));
    file.remove("tokenizer.ggml.bos_token_id");
    assert_eq!(load(&file).unwrap().lead(), None);
}

#[test]
fn other_tokenizers_are_refused() {
    let model = refused(|file| file.set("tokenizer.ggml.model", text("llama")));
    assert_eq!(model, "unsupported tokenizer \"llama\": this example reads gpt2");
    let pre = refused(|file| file.set("tokenizer.ggml.pre", text("qwen2")));
    assert!(pre.starts_with("unsupported pre-tokenizer \"qwen2\""), "{pre}");
}

#[test]
fn damaged_vocabularies_are_refused() {
    for merges in [["a"], ["a z"], ["a 1"], ["ab ab"]] {
        let error = refused(|file| file.set("tokenizer.ggml.merges", texts(&merges)));
        assert_eq!(error, format!("damaged: merge {:?} is not of the vocabulary", merges[0]));
    }
    let kinds = refused(|file| file.set("tokenizer.ggml.token_type", integers(&[1])));
    assert_eq!(kinds, "tokenizer.ggml.token_type is for 1 tokens, but there are 10");
    let twice = refused(|file| file.set("tokenizer.ggml.tokens", texts(&["a"; 10])));
    assert_eq!(twice, "damaged: the vocabulary has a token twice");
    let id = refused(|file| file.set("tokenizer.ggml.eos_token_id", integer(10)));
    assert_eq!(id, "tokenizer.ggml.eos_token_id is 10, but there are 10 tokens");
}

/// Token ids as the Hugging Face tokenizer of the model gives them.
#[test]
fn real_model_encodes_as_published() {
    let Some(tokenizer) = model_tokenizer() else { return };
    let cases: [(&str, &[u32]); 8] = [
        ("Hello, world!", &[19556, 28, 905, 17]),
        (
            "I'll pay 1234.50 in 2026",
            &[57, 3060, 2290, 216, 33, 34, 35, 36, 30, 37, 32, 281, 216, 34, 32, 34, 38],
        ),
        ("  two  spaces\n\n\tand a tab ", &[216, 827, 216, 5600, 1116, 197, 397, 253, 10147, 216]),
        ("naïve café — “quoted”", &[3546, 46494, 37366, 1841, 619, 385, 5036, 573]),
        ("你好，世界 🙂", &[18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230, 47526]),
        ("½ Ⅷ ٣", &[16738, 216, 173, 223, 117, 216, 164, 113]),
        ("<|im_start|>user\nhi<|im_end|>\n", &[1, 4093, 198, 6004, 2, 198]),
        (
            "fn main() { println!(\"{}\", x_1); }",
            &[7853, 1085, 1000, 1662, 1628, 34115, 17, 43331, 1002, 1792, 79, 33, 4258, 4029],
        ),
    ];
    for (text, tokens) in cases {
        assert_eq!(tokenizer.encode(text).unwrap(), tokens, "{text:?}");
    }
    assert_eq!(tokenizer.stops(), [0, 2]);
    assert_eq!(tokenizer.lead(), None);
}

#[test]
fn real_model_round_trips() {
    let Some(tokenizer) = model_tokenizer() else { return };
    let parts = [
        "hello",
        " world",
        "  ",
        "\n",
        "\t",
        "I'll",
        "1234",
        "½",
        "٣",
        "你好",
        "日本語",
        "🙂",
        "👨‍👩‍👧",
        "e\u{301}",
        "ß",
        "a_b",
        ">>=",
        "\u{a0}",
        "\r\n",
        "\0",
        "𐍈",
        "“q”",
        "\u{feff}",
    ];
    let mut random = Random::new(9);
    for _ in 0..500 {
        let picks = (0..random.below(12)).map(|_| random.below(parts.len())).collect::<Vec<_>>();
        let text = picks.into_iter().map(|pick| parts[pick]).collect::<String>();
        assert_eq!(decode(&tokenizer, &tokenizer.encode(&text).unwrap()), text);
    }
}

#[test]
fn real_model_encodes_long_runs() {
    let Some(tokenizer) = model_tokenizer() else { return };
    for part in [" ", "a", "1", "\n", "🙂", "' "] {
        let text = part.repeat(200_000);
        assert_eq!(decode(&tokenizer, &tokenizer.encode(&text).unwrap()), text);
    }
}

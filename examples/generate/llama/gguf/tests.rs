use super::{
    Checkpoint, LlamaConfig, Weight,
    header::Header,
    synthetic::{self, File, float, integer, list, llama, text, value},
};
use crate::llama::testing::{Random, model_path};

fn config(bytes: &[u8]) -> Result<LlamaConfig, String> {
    let header = Header::read(bytes, bytes.len() as u64);
    header.and_then(|header| LlamaConfig::new(&header)).map_err(|error| format!("{error:#}"))
}

/// The error after `change`.
#[track_caller]
fn refused(change: impl FnOnce(&mut File)) -> String {
    let mut file = llama();
    change(&mut file);
    config(&file.bytes()).unwrap_err()
}

#[test]
fn smallest_llama_is_read() {
    let config = config(&llama().bytes()).unwrap();
    let expected = LlamaConfig {
        layers: 1,
        dims: 2,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
        ffn_dims: 4,
        vocab: 3,
        context_length: 16,
        rope_base: 10_000.0,
        rms_eps: 1e-5,
        tied: true,
    };
    assert_eq!(config, expected);
}

#[test]
fn an_output_matrix_unties_the_head() {
    let mut file = llama();
    file.add("output.weight", &[2, 3]);
    assert!(!config(&file.bytes()).unwrap().tied);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = llama().bytes();
    for len in 0..bytes.len() {
        let error = config(&bytes[..len]).unwrap_err();
        assert!(error.contains("truncated") || len < 4, "{len} bytes: {error}");
    }
}

#[test]
fn a_truncated_weight_is_named_with_both_lengths() {
    let bytes = llama().bytes();
    let len = bytes.len();
    assert_eq!(
        config(&bytes[..len - 1]).unwrap_err(),
        format!(
            "truncated: tensor \"blk.0.ffn_down.weight\" ends at byte {len}, \
             but the file has {}; download it again",
            len - 1,
        ),
    );
}

#[test]
fn other_files_are_not_gguf() {
    for bytes in [b"".as_slice(), b"GGU", b"PK\x03\x04 a zip file", &[0; 64]] {
        assert_eq!(config(bytes).unwrap_err(), "not a GGUF file: give --model one of a llama");
    }
}

#[test]
fn other_versions_are_refused() {
    for version in [0, 1, 4, 3_u32.swap_bytes()] {
        let error = refused(|file| file.version = version);
        assert!(error.starts_with(&format!("GGUF version {version} is")), "{error}");
    }
    let mut file = llama();
    file.version = 2;
    assert!(config(&file.bytes()).is_ok());
}

#[test]
fn absurd_counts_are_refused_before_anything_is_reserved() {
    for position in [8, 16] {
        for count in [u64::MAX, i64::MAX as u64, 1 << 32, 1 << 20] {
            let mut bytes = llama().bytes();
            bytes[position..position + 8].copy_from_slice(&count.to_le_bytes());
            let error = config(&bytes).unwrap_err();
            assert!(error.contains("a length of") || error.contains("asks for"), "{error}");
        }
    }
}

#[test]
fn absurd_lengths_in_values_are_refused() {
    let huge = [u64::MAX, 1 << 40, 1 << 23];
    for len in huge {
        let string = refused(|file| file.set("general.name", value(8, len.to_le_bytes())));
        assert!(string.starts_with("metadata \"general.name\": "), "{string}");
        for kind in [0, 4, 8] {
            let items = list(kind, len as usize, []);
            let error = refused(|file| file.set("general.tags", items));
            assert!(error.starts_with("metadata \"general.tags\": "), "{error}");
        }
    }
}

#[test]
fn values_mlx_cannot_load_are_refused() {
    let nested = refused(|file| file.set("x", list(9, 0, [])));
    assert_eq!(nested, "metadata \"x\": a list of lists, which MLX cannot load");
    let double = refused(|file| file.set("x", value(12, 1_f64.to_le_bytes())));
    assert_eq!(double, "metadata \"x\": a 64-bit float, which MLX misreads");
    let unknown = refused(|file| file.set("x", value(13, [0])));
    assert_eq!(unknown, "metadata \"x\": damaged: values of type 13 do not exist");
}

#[test]
fn keys_and_tensors_appear_once() {
    let pair = refused(|file| file.pairs.push(file.pairs[0].clone()));
    assert_eq!(pair, "damaged: metadata \"general.architecture\" appears twice");
    let tensor = refused(|file| file.tensors.push(file.tensors[0].clone()));
    assert_eq!(tensor, "damaged: tensor \"token_embd.weight\" appears twice");
}

#[test]
fn strings_are_utf8() {
    let error = refused(|file| file.set("x", value(8, [1, 0, 0, 0, 0, 0, 0, 0, 0xff])));
    assert!(error.contains("is not UTF-8"), "{error}");
}

#[test]
fn alignment_is_checked() {
    for alignment in [0, 7, 12, u32::MAX] {
        let error = refused(|file| file.set("general.alignment", integer(alignment)));
        assert_eq!(error, format!("damaged: general.alignment is {alignment}"));
    }
    let wide = refused(|file| file.set("general.alignment", value(10, 32_u64.to_le_bytes())));
    assert_eq!(wide, "damaged: general.alignment is not a u32");
}

#[test]
fn unsupported_storage_is_named() {
    let known = refused(|file| file.tensors[0].kind = 12);
    assert_eq!(
        known,
        "tensor \"token_embd.weight\": stored as Q4_K, which MLX refuses or misreads; \
         use a file in F16, Q8_0, Q4_0 or Q4_1",
    );
    let unknown = refused(|file| file.tensors[0].kind = 4_000_000_000);
    assert!(unknown.ends_with("stored as type 4000000000, which is not known here"), "{unknown}");
}

#[test]
fn rows_are_whole_blocks() {
    let error = refused(|file| file.tensors[0].kind = 2);
    assert!(error.ends_with("rows of 2 are not made of Q4_0 blocks of 32"), "{error}");
}

#[test]
fn shapes_are_checked() {
    let shapes = [vec![], vec![1; 5], vec![1; 9], vec![0, 2], vec![1 << 31], vec![u64::MAX]];
    for dims in shapes {
        let error = refused(|file| file.tensors[0].dims = dims.clone());
        assert!(error.contains("dimensions"), "{dims:?}: {error}");
    }
    let overflow = refused(|file| file.tensors[0].dims = vec![i32::MAX as u64; 3]);
    assert!(overflow.contains("damaged: dimensions"), "{overflow}");
}

#[test]
fn offsets_cannot_leave_the_file() {
    let overflow = refused(|file| file.tensors[0].offset = u64::MAX - 31);
    assert!(overflow.ends_with("beyond any file"), "{overflow}");
    let beyond = refused(|file| file.tensors[0].offset = 1 << 40);
    assert!(beyond.starts_with("truncated: tensor \"token_embd.weight\" ends at"), "{beyond}");
    let skewed = refused(|file| file.tensors[0].offset = 4);
    assert!(skewed.ends_with("off the alignment of 32"), "{skewed}");
}

#[test]
fn only_plain_llamas_are_run() {
    let other = refused(|file| file.set("general.architecture", text("gemma3")));
    assert_eq!(other, "unsupported architecture \"gemma3\": this example runs llama");
    let missing = refused(|file| file.remove("general.architecture"));
    assert_eq!(missing, "the file has no metadata general.architecture");
    let scaled = refused(|file| file.set("llama.rope.scaling.type", text("yarn")));
    assert_eq!(scaled, "unsupported rotary scaling \"yarn\"");
    let extra = refused(|file| file.add("rope_freqs.weight", &[1]));
    assert_eq!(extra, "tensor \"rope_freqs.weight\" is not part of a plain llama");
}

#[test]
fn sizes_are_checked() {
    for size in [0, u32::MAX] {
        let error = refused(|file| file.set("llama.embedding_length", integer(size)));
        assert!(error.starts_with("llama.embedding_length must be from 1"), "{error}");
    }
    let kind = refused(|file| file.set("llama.block_count", text("many")));
    assert_eq!(kind, "metadata llama.block_count is not an integer");
    let heads = refused(|file| file.set("llama.attention.head_count_kv", integer(2)));
    assert_eq!(heads, "1 heads cannot share 2 key-value heads");
    let odd = refused(|file| file.set("llama.attention.head_count", integer(2)));
    assert_eq!(odd, "heads of 1 cannot be rotated by pairs");
    let partial = refused(|file| file.set("llama.rope.dimension_count", integer(4)));
    assert!(partial.starts_with("llama.rope.dimension_count is 4"), "{partial}");
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let key = "llama.attention.layer_norm_rms_epsilon";
        let error = refused(|file| file.set(key, float(eps)));
        assert!(error.starts_with(key), "{error}");
    }
}

#[test]
fn tensors_fit_the_sizes() {
    let missing = refused(|file| file.set("llama.block_count", integer(2_000_000_000)));
    assert_eq!(missing, "the file has no tensor \"blk.1.attn_norm.weight\"");
    let shape = refused(|file| file.set("llama.feed_forward_length", integer(8)));
    assert!(shape.ends_with("is [4, 2], expected [8, 2]"), "{shape}");
    let vocab = refused(|file| file.set("tokenizer.ggml.tokens", synthetic::texts(&["a"])));
    assert_eq!(vocab, "tensor \"token_embd.weight\" is [3, 2], expected [1, 2]");
}

/// Up to three bytes changed, and half of the time the end cut off.
fn damage(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(damaged.len());
        damaged[at] = [random.below(256) as u8, 0, 0xff][random.below(3)];
    }
    damaged.truncate(damaged.len() - random.below(2) * random.below(damaged.len()));
    damaged
}

#[test]
fn damaged_bytes_never_panic() {
    let bytes = llama().bytes();
    let mut random = Random::new(7);
    for _ in 0..20_000 {
        let _unused = config(&damage(&bytes, &mut random));
    }
}

/// What gets past the checks must not crash MLX, which takes the whole process down.
#[test]
fn mlx_survives_what_the_checks_let_through() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.gguf");
    let bytes = llama().bytes();
    let mut random = Random::new(8);
    for _ in 0..500 {
        std::fs::write(&path, damage(&bytes, &mut random)).unwrap();
        let _unused = Checkpoint::open(&path);
    }
}

#[test]
fn paths_that_are_no_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Checkpoint::open(&folder.path().join("none.gguf")).unwrap_err();
    assert!(format!("{missing:#}").contains("none.gguf: give --model the path"), "{missing:#}");
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [folder.path(), &socket] {
        let not_a_file = Checkpoint::open(path).unwrap_err();
        assert!(format!("{not_a_file:#}").ends_with(": not a file"), "{not_a_file:#}");
    }
}

#[test]
fn weights_of_a_written_file_are_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    std::fs::write(&path, llama().bytes()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let Weight::Dense(weight) = checkpoint.weight("token_embd").unwrap() else {
        panic!("an F32 tensor is not packed")
    };
    assert_eq!(weight.shape(), [3, 2]);
    assert!(checkpoint.weight("output").is_err());
}

#[test]
fn real_model_is_read() {
    let Some(path) = model_path() else { return };
    let checkpoint = Checkpoint::open(&path).unwrap();
    let config = checkpoint.config();
    assert_eq!((config.layers, config.dims, config.ffn_dims), (30, 576, 1536));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.vocab, config.context_length, config.tied), (49152, 8192, true));
    assert_eq!((config.rope_base, config.rms_eps), (100_000.0, 1e-5));
    for (name, expected) in [("token_embd", 8), ("blk.29.ffn_down", 4)] {
        let weight = checkpoint.weight(name).unwrap();
        assert!(matches!(weight, Weight::Packed(packed) if packed.bits() == expected));
    }
    assert!(matches!(checkpoint.weight("output_norm").unwrap(), Weight::Dense(_)));
}

//! Engines over blocks of 8 bits.

use mlx_primitives::{
    attention::{BlockForm, KvCache},
    cache::{PagedKv, PagedKvOptions, PagedLayer, PagedPool, PagedPoolOptions},
    generation::{
        CausalModel, DraftModel, DraftModelOptions, GenerationEngine, GenerationEngineOptions,
        GenerationRequest,
    },
};
use mlx_rs::{Array, Dtype};

use super::{
    Decoder, cache_bytes, engine, options, params, prompt, request,
    texts::{expected, requests, together},
};
use crate::support::tensor::Tensor;

use BlockForm::{Fp8, Int8, Plain};

/// Of keys and of values.
const FORMS: [[BlockForm; 2]; 3] = [[Int8, Int8], [Fp8, Fp8], [Int8, Fp8]];

fn in_forms([cache_keys, cache_values]: [BlockForm; 2]) -> GenerationEngineOptions {
    GenerationEngineOptions { cache_keys, cache_values, ..options() }
}

/// The logits after each token of a text, `[S, V]`, over blocks in these forms.
fn logits(tokens: &[u32], [keys, values]: [BlockForm; 2]) -> Tensor {
    let mut decoder = Decoder::new();
    let mut pool = PagedPool::new(PagedPoolOptions::new(8)).unwrap();
    let kv = |_| {
        PagedKv::new(&PagedKvOptions {
            blocks: 8,
            block_size: pool.block_size(),
            num_kv_heads: 2,
            head_dim: 8,
            value_dim: None,
            dtype: Dtype::Float32,
            keys,
            values,
        })
    };
    let mut kvs = (0..2).map(kv).collect::<Result<Vec<_>, _>>().unwrap();
    let id = pool.open(&[], b"").unwrap();
    pool.append(id, tokens).unwrap();
    let step = pool.step(&[id], 0).unwrap();
    let mut layers: Vec<PagedLayer> = kvs.iter_mut().map(|kv| kv.layer(&step)).collect();
    let mut caches: Vec<_> = layers.iter_mut().map(|layer| layer as &mut dyn KvCache).collect();
    let rows = Array::from_slice(tokens, &[tokens.len() as i32, 1]);
    let hidden = decoder.hidden(&rows, &mut caches).unwrap();
    Tensor::of(&decoder.logits(&hidden).unwrap())
}

/// How far logits are from those over plain blocks, as a share of these: of all together and of the worst row, as root mean
/// squares.
fn off(found: &Tensor, plain: &Tensor) -> [f64; 2] {
    let sum = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>();
    let rows = found.rows().zip(plain.rows()).map(|(found, plain)| {
        let off: Vec<_> = found.iter().zip(plain).map(|(x, y)| x - y).collect();
        [sum(&off), sum(plain)]
    });
    let rows: Vec<_> = rows.collect();
    let all = rows.iter().fold([0.0; 2], |[x, y], row| [x + row[0], y + row[1]]);
    let worst = rows.iter().map(|row| row[0] / row[1]).fold(0.0, f64::max);
    [all[0] / all[1], worst].map(f64::sqrt)
}

/// In each form what was found of [`off`] over six texts, and how many of 384 greedy tokens came before the first that was
/// another. Random weights make much of little, so that what tells is the ratio: Fp8 rounds four times as coarsely as Int8.
const FOUND: [([f64; 2], usize); 3] =
    [([0.0175, 0.141], 370), ([0.0787, 0.315], 193), ([0.0438, 0.179], 261)];

#[test]
fn logits_are_close_to_those_of_plain_blocks() {
    for (forms, ([all, row], _)) in FORMS.into_iter().zip(FOUND) {
        let mut most = [0.0_f64; 2];
        for text in 0..6 {
            let tokens = prompt(100 + text, 100);
            let off = off(&logits(&tokens, forms), &logits(&tokens, [Plain; 2]));
            most = [most[0].max(off[0]), most[1].max(off[1])];
        }
        // A third more, for devices that sum in another order.
        assert!(most[0] <= all * 4.0 / 3.0 && most[1] <= row * 4.0 / 3.0, "{forms:?}: {most:?}");
    }
}

#[test]
fn greedy_texts_say_what_the_logits_over_their_blocks_say() {
    let requests: Vec<_> =
        (0..16).map(|seed| request(prompt(seed, 12), 24, params(seed, 0.0))).collect();
    let plain = expected(&requests);
    for (forms, (_, found)) in FORMS.into_iter().zip(FOUND) {
        let texts = together(&engine(in_forms(forms)), &requests);
        for (text, request) in texts.iter().zip(&requests) {
            let said = logits(&[&request.prompt[..], text].concat(), forms);
            let best = |row: &[f64]| {
                (0..).zip(row).max_by(|one, other| one.1.total_cmp(other.1)).map(|best| best.0)
            };
            let best: Vec<u32> = said.rows().filter_map(best).collect();
            assert_eq!(best[11..35], text[..], "{forms:?}");
        }
        // Once a token is another, so is the rest.
        let same = |(one, other): (&Vec<u32>, &Vec<u32>)| {
            one.iter().zip(other).take_while(|(one, other)| one == other).count()
        };
        let same: usize = texts.iter().zip(&plain).map(same).sum();
        assert!(same * 4 >= found * 3, "{forms:?}: {same}");
    }
}

fn alone(options: GenerationEngineOptions, requests: &[GenerationRequest]) -> Vec<Vec<u32>> {
    let engine = engine(options);
    let text = |request: &GenerationRequest| {
        engine.generate(request.clone()).unwrap().swap_remove(0).tokens
    };
    requests.iter().map(text).collect()
}

#[test]
fn a_text_is_the_same_alone_in_a_batch_in_chunks_and_after_waiting() {
    let requests = requests(16);
    for forms in FORMS {
        let alone = alone(in_forms(forms), &requests);
        assert_eq!(together(&engine(in_forms(forms)), &requests), alone, "{forms:?} together");
        let chunks = GenerationEngineOptions {
            max_batch_tokens: 24,
            max_prompt_chunk: 7,
            ..in_forms(forms)
        };
        assert_eq!(together(&engine(chunks), &requests), alone, "{forms:?} in chunks");
        let cache_bytes = in_forms(forms).cache_bytes_for(&Decoder::new(), 160);
        let little = engine(GenerationEngineOptions { cache_bytes, ..in_forms(forms) });
        assert_eq!(together(&little, &requests), alone, "{forms:?} in little room");
        assert_eq!(little.stats().used_blocks, 0);
    }
}

#[test]
fn prompts_that_began_alike_share_blocks_in_every_form() {
    let shared = prompt(3, 50);
    let request = |tail: u32| request([&shared[..], &[tail]].concat(), 8, params(5, 1.0));
    for forms in FORMS {
        let engine = engine(in_forms(forms));
        for tail in [1, 2, 1] {
            let text = engine.generate(request(tail)).unwrap().swap_remove(0);
            assert_eq!(text.tokens, alone(in_forms(forms), &[request(tail)])[0], "{forms:?}");
        }
        assert_eq!(engine.stats().shared_tokens, 2 * 48);
    }
}

#[test]
fn the_budget_counts_what_the_forms_take() {
    // Two layers of two heads of 8.
    let bytes = |forms, tokens| in_forms(forms).cache_bytes_for(&Decoder::new(), tokens);
    assert_eq!(bytes([Plain; 2], 4096), cache_bytes(4096));
    for forms in FORMS {
        assert_eq!(bytes(forms, 64), (4 + 1) * 16 * 2 * 2 * 2 * (8 + 4), "{forms:?}");
        let with = |forms| GenerationEngineOptions {
            cache_bytes: bytes([Int8; 2], 64),
            ..in_forms(forms)
        };
        let engine = engine(with(forms));
        let fits = request(prompt(1, 60), 4, params(1, 0.0));
        assert_eq!(engine.generate(fits.clone()).unwrap()[0].tokens.len(), 4);
        let refused = engine.submit(GenerationRequest { max_tokens: 5, ..fits }).unwrap_err();
        assert!(refused.to_string().contains("need at most 4 blocks of 16 tokens"), "{refused}");
        let refused = GenerationEngine::new(Decoder::new(), with([Plain; 2])).unwrap_err();
        assert!(refused.to_string().contains("be room for 2 blocks"), "{refused}");
    }
    assert_eq!(bytes([Plain, Fp8], 64), (4 + 1) * 16 * 2 * 2 * (4 * 8 + 8 + 4));
}

#[test]
fn drafts_change_no_text_in_any_form() {
    let requests: Vec<_> =
        (0..6).map(|seed| request(prompt(seed, 9), 12, params(seed, 0.0))).collect();
    for forms @ [cache_keys, cache_values] in FORMS {
        let draft = DraftModelOptions { cache_keys, cache_values, ..Default::default() };
        let drafted = |options| {
            let drafter = DraftModel::new(Decoder::new(), draft.clone()).unwrap();
            GenerationEngine::with_drafter(Decoder::new(), drafter, options).unwrap()
        };
        let plain = drafted(options());
        assert_eq!(together(&plain, &requests), expected(&requests), "{forms:?}");
        let stats = plain.stats();
        assert!(stats.accepted_tokens * 2 > stats.drafted_tokens, "{stats:?}");
        assert_eq!(
            together(&drafted(in_forms(forms)), &requests),
            alone(in_forms(forms), &requests),
            "{forms:?}"
        );
    }
}

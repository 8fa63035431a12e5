mod checked;
mod forms;

use mlx_primitives::{
    Backend, Dispatch, Error, Layout,
    attention::{AttentionDropout, BlockForm, FlashAttentionOptions, KvCache, Segments, Window},
    cache::{
        PagedKv, PagedKvOptions, PagedPool, PagedPoolOptions, SequenceId, SimpleKvCache,
        load_caches, save_caches,
    },
    dispatch::{Context, Target},
    layers::{AttentionBuilder, AttentionInput},
    rope::{Rope, RopeOffset},
};
use mlx_rs::{
    Array, Dtype,
    builder::Builder,
    module::Module,
    ops::{concatenate, indexing::IndexOp},
    transforms::eval,
};

use self::checked::{ASKED, Asked, BLOCK, BLOCKS, Checked, F32, HEADS, PLAIN, pool};
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    host,
    sample::{Random, normal},
    tensor::Tensor,
};

#[test]
fn random_operations_attend_as_lists_would() {
    for seed in 0..6 {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let checked = Checked::new(FLOATING[random.below(3)]);
        run_at_random(checked, &mut random, ASKED[seed as usize]);
    }
}

/// Opens, forks, cuts, closes and writes sequences, each step compared with the oracle.
fn run_at_random(mut checked: Checked, random: &mut Random, asked: Asked) {
    for _ in 0..60 {
        let ids: Vec<_> = checked.lists.keys().copied().collect();
        let tokens = |random: &mut Random, most| -> Vec<u32> {
            (0..random.below(most)).map(|_| random.below(2) as u32).collect()
        };
        match (random.below(8), ids.is_empty()) {
            (0, _) | (_, true) if ids.len() < 5 => {
                let prompt = tokens(random, 14);
                let id = checked.open(&prompt);
                let held = checked.lists[&id].len();
                checked.append(id, &prompt[held..]);
            }
            (1, _) if ids.len() < 5 => {
                let id = ids[random.below(ids.len())];
                if checked.written[&id] == checked.lists[&id].len() {
                    checked.fork(id);
                }
            }
            (2, _) => {
                let id = ids[random.below(ids.len())];
                let len = random.below(checked.lists[&id].len() + 1);
                checked.pool.truncate(id, len as i32).unwrap();
                checked.lists.get_mut(&id).unwrap().truncate(len);
                let written = checked.written.get_mut(&id).unwrap();
                *written = (*written).min(len);
            }
            (3, _) => checked.close(ids[random.below(ids.len())]),
            _ => {
                for &id in &ids {
                    if checked.lists[&id].len() < 40 {
                        let most = if random.below(3) == 0 { 7 } else { 2 };
                        let tokens = tokens(random, most);
                        checked.append(id, &tokens);
                    }
                }
                let mut ids = ids;
                ids.retain(|id| checked.written[id] < checked.lists[id].len());
                if !ids.is_empty() {
                    let layout = [Layout::Bshd, Layout::Bhsd][random.below(2)];
                    checked.step(&ids, random.below(12), asked, layout);
                }
            }
        }
        checked.lists.keys().for_each(|&id| checked.read(id));
    }
    let ids: Vec<_> = checked.lists.keys().copied().collect();
    ids.into_iter().for_each(|id| checked.close(id));
    assert_eq!(checked.pool.used_blocks(), 0);
}

#[test]
fn a_copy_that_is_yet_to_be_made_is_read_where_it_comes_from() {
    let mut checked = Checked::new(F32);
    let id = checked.open(&[]);
    checked.append(id, &[1, 0, 1]);
    checked.step(&[id], 0, PLAIN, Layout::Bshd);
    let fork = checked.fork(id);
    checked.append(fork, &[1]);
    checked.read(fork);
    checked.pool.truncate(fork, 3).unwrap();
    checked.lists.insert(fork, vec![1, 0, 1]);
    assert_ne!(checked.pool.table(fork).unwrap(), checked.pool.table(id).unwrap());
    checked.read(fork);
}

#[test]
fn a_layer_that_attends_again_copies_no_block_again() {
    let mut checked = Checked::new(F32);
    let first = checked.open(&[]);
    checked.append(first, &[1, 0, 1]);
    checked.step(&[first], 0, PLAIN, Layout::Bshd);
    let fork = checked.fork(first);
    checked.append(fork, &[0]);
    // What the fork's block is a copy of is overwritten in the step that copies it.
    let shared = checked.pool.table(first).unwrap().to_vec();
    checked.close(first);
    let second = checked.open(&[]);
    checked.append(second, &[0, 1, 0]);
    assert_eq!(checked.pool.table(second).unwrap(), shared);
    let step = checked.pool.step(&[fork, second], 0).unwrap();
    for _ in 0..2 {
        let tokens = [(0, 3), (0, 0), (1, 1), (0, 2)];
        checked.attended(&step, &tokens, PLAIN, Layout::Bshd);
        checked.written.extend([(fork, 4), (second, 3)]);
        checked.read(fork);
        checked.read(second);
    }
}

#[test]
fn a_step_of_another_pool_is_refused() {
    let mut large =
        PagedPool::new(PagedPoolOptions { block_size: BLOCK, ..PagedPoolOptions::new(BLOCKS + 1) })
            .unwrap();
    let id = large.open(&[], b"").unwrap();
    large.append(id, &[1; 3]).unwrap();
    let step = large.step(&[id], 0).unwrap();
    let mut checked = Checked::new(F32);
    let before = Tensor::of(&checked.kv.key_blocks().unwrap());
    let [keys, values] = [[2, 8], [2, 5]].map(|[heads, size]| normal(1, &[3, 1, heads, size], F32));
    let queries = normal(2, &[3, 1, 4, 8], F32);
    let expected = format!("must have at most {BLOCKS} blocks but got {}", BLOCKS + 1);
    for refused in [
        checked.kv.write(&step, &keys, &values).unwrap_err(),
        checked.kv.layer(&step).attend(&queries, &keys, &values, Default::default()).unwrap_err(),
    ] {
        assert_eq!(refused.to_string(), format!("[PagedKv] step {expected}"));
    }
    let refused = checked.kv.read(&large, id).unwrap_err().to_string();
    assert_eq!(refused, format!("[PagedKv] pool {expected}"));
    assert_eq!(Tensor::of(&checked.kv.key_blocks().unwrap()), before);
    let refused = checked.pool.computed(&step).unwrap_err().to_string();
    assert_eq!(refused, "[PagedPool] step must be one of this pool but got one of another");
}

#[test]
fn every_backend_attends_to_what_a_step_says() {
    let backends = if host::install() { Backend::ALL } else { &[Backend::Reference] };
    for &backend in backends.iter().filter(|&&backend| backend != Backend::Builtin) {
        for asked in ASKED {
            run_on(backend, Checked::new(F32), asked);
        }
        println!("checked: PagedKv on {backend}");
    }
}

#[test]
fn mlx_attends_for_one_sequence_whose_blocks_lie_in_a_row() {
    let builtin = Dispatch::Only(Backend::Builtin);
    for asked in [PLAIN, Asked { scale: Some(0.7), ..PLAIN }, Asked { causal: false, ..PLAIN }] {
        let mut checked = Checked::new(F32);
        checked.dispatch = builtin;
        let [before, id] = [(); 2].map(|()| checked.open(&[]));
        checked.append(before, &[0; 5]);
        checked.step(&[before], 0, asked, Layout::Bshd);
        for (tokens, layout) in [(9, Layout::Bshd), (1, Layout::Bhsd), (3, Layout::Bhsd)] {
            checked.append(id, &vec![1; tokens]);
            checked.step(&[id], 0, asked, layout);
        }
        assert_eq!(checked.pool.table(id).unwrap(), [3, 4, 5, 6]);
    }

    let refused = |checked: &mut Checked, ids: &[SequenceId], rows, asked| {
        ids.iter().for_each(|&id| checked.append(id, &[1]));
        let step = checked.pool.step(ids, rows).unwrap();
        let [q, k, v] = [[4, 8], [2, 8], [2, 5]]
            .map(|[heads, size]| normal(1, &[step.rows(), 1, heads, size], F32));
        let window = Window { left: asked, right: None };
        let options = FlashAttentionOptions { dispatch: builtin, window, ..Default::default() };
        let attended = checked.kv.layer(&step).attend(&q, &k, &v, options);
        matches!(attended, Err(Error::Unavailable { .. }))
    };
    let mut checked = Checked::new(F32);
    let [one, other] = [(); 2].map(|()| checked.open(&[]));
    assert!(refused(&mut checked, &[one, other], 0, None), "two sequences");
    assert!(refused(&mut checked, &[one], 8, None), "rows of none");
    assert!(refused(&mut checked, &[one], 0, Some(2)), "a window");
    assert!(!refused(&mut checked, &[one], 0, None));
    assert!(refused(&mut checked, &[one], 0, None), "a gap");
    assert_eq!(checked.pool.table(one).unwrap(), [1, 3]);
}

/// Two steps of prompts, tokens and a fork.
fn run_on(backend: Backend, mut checked: Checked, asked: Asked) {
    checked.dispatch = Dispatch::Only(backend);
    let [one, other] = [(); 2].map(|()| checked.open(&[]));
    checked.append(one, &[1, 0, 1, 1, 0]);
    checked.append(other, &[1; 7]);
    checked.step(&[one, other], 14, asked, Layout::Bshd);
    let fork = checked.fork(one);
    checked.append(fork, &[0]);
    checked.append(one, &[1, 1]);
    checked.append(other, &[0]);
    checked.step(&[other, fork, one], 4, asked, Layout::Bhsd);
}

#[test]
fn a_fork_and_its_parent_go_on_by_themselves() {
    fork_and_go_on(Checked::new(F32));
}

fn fork_and_go_on(mut checked: Checked) {
    let parent = checked.open(&[]);
    checked.append(parent, &[1, 0, 1, 1, 0, 1]);
    checked.step(&[parent], 0, PLAIN, Layout::Bshd);
    let child = checked.fork(parent);
    checked.append(parent, &[0]);
    checked.append(child, &[1]);
    checked.step(&[parent, child], 0, PLAIN, Layout::Bshd);
    checked.append(child, &[0]);
    checked.append(parent, &[1]);
    checked.step(&[child, parent], 0, PLAIN, Layout::Bshd);
    assert_eq!(checked.pool.used_blocks(), 3, "one whole block is shared");
    checked.close(parent);
    checked.append(child, &[1, 1]);
    checked.step(&[child], 0, PLAIN, Layout::Bshd);
    checked.close(child);
    assert_eq!(checked.pool.used_blocks(), 0);
}

#[test]
fn tokens_and_copies_are_written_in_place() {
    write_in_place(Checked::new(F32));
}

fn write_in_place(mut checked: Checked) {
    if Context::current().unwrap().target == Target::Cuda {
        // MLX moves a buffer there when the host looks at it.
        println!("skipped: the address of a CUDA buffer says nothing");
        return;
    }
    let address = |kv: &PagedKv| {
        eval(kv.arrays()).unwrap();
        let address = |array: &Array| match array.dtype() {
            Dtype::Int8 => array.as_slice::<i8>().as_ptr().addr(),
            Dtype::Uint8 => array.as_slice::<u8>().as_ptr().addr(),
            _ => array.as_slice::<f32>().as_ptr().addr(),
        };
        kv.arrays().map(address).collect::<Vec<_>>()
    };
    let first = address(&checked.kv);
    let parent = checked.open(&[]);
    checked.append(parent, &[1, 0, 1, 1, 0]);
    checked.step(&[parent], 0, PLAIN, Layout::Bshd);
    assert_eq!(address(&checked.kv), first);
    let child = checked.fork(parent);
    for token in [0, 1, 1] {
        checked.append(parent, &[token]);
        checked.append(child, &[1 - token]);
        checked.step(&[parent, child], 0, PLAIN, Layout::Bshd);
        assert_eq!(address(&checked.kv), first);
    }
    let shared = checked.open(&[1, 0, 1, 1, 0, 1, 1, 1]);
    assert_eq!(checked.lists[&shared].len(), 6, "one block, and half of one to copy");
    checked.append(shared, &[0]);
    checked.step(&[shared], 0, PLAIN, Layout::Bshd);
    assert_eq!(address(&checked.kv), first);
}

#[test]
fn a_model_over_rows_says_what_it_says_over_whole_texts() {
    let rope = Rope::new(4).unwrap();
    let builder = AttentionBuilder::new(12, 4).num_kv_heads(2).head_dim(8).rope(rope);
    let mut attention = builder.build().unwrap();
    let texts = [normal(1, &[1, 9, 12], F32), normal(2, &[1, 6, 12], F32)];
    let whole = texts.each_ref().map(|x| Tensor::of(&attention.forward(x).unwrap()));
    let mut pool = pool();
    let mut kv = PagedKv::new(&PagedKvOptions {
        blocks: BLOCKS,
        block_size: BLOCK,
        num_kv_heads: 2,
        head_dim: 8,
        value_dim: None,
        dtype: F32,
        keys: BlockForm::Plain,
        values: BlockForm::Plain,
    })
    .unwrap();
    let ids = [(); 2].map(|()| pool.open(&[], b"").unwrap());
    let mut parts = [Vec::new(), Vec::new()];
    // A prompt of one beside a token of the other, and the other way round.
    for lengths in [[4, 1], [1, 3], [1, 1], [3, 1]] {
        let mut x = Vec::new();
        for (n, &length) in lengths.iter().enumerate() {
            let first = pool.len(ids[n]).unwrap();
            x.push(texts[n].index((0, first..first + length, ..)));
            pool.append(ids[n], &vec![0; length as usize]).unwrap();
        }
        let step = pool.step(&ids, 7).unwrap();
        let padding = step.rows() - lengths.iter().sum::<i32>();
        x.push(normal(3, &[padding, 12], F32));
        let x = concatenate(&x, 0).unwrap().expand_dims(1).unwrap();
        let mut layer = kv.layer(&step);
        assert!(matches!(layer.offset(), RopeOffset::PerRow(_)));
        let input = AttentionInput { x: &x, mask: None, cache: Some(&mut layer) };
        let y = attention.forward(input).unwrap();
        for (n, ends) in step.query_starts().windows(2).enumerate() {
            parts[n].push(y.index((ends[0]..ends[1], 0, ..)));
        }
        assert_eq!(step.last_rows(), [lengths[0] - 1, lengths[0] + lengths[1] - 1]);
    }
    for (parts, whole) in parts.iter().zip(whole) {
        let joined = concatenate(parts, 0).unwrap().expand_dims(0).unwrap();
        assert_close("in rows", &joined, &whole, Tolerance::LAYER);
    }
}

#[test]
fn what_no_row_can_heed_is_refused_before_anything_changes() {
    let mut checked = Checked::new(F32);
    let id = checked.open(&[]);
    checked.append(id, &[1, 0, 1]);
    let step = checked.pool.step(&[id], 0).unwrap();
    let [heads, key_heads, size, value_size] = HEADS.map(|size| size as i32);
    let q = normal(1, &[3, 1, heads, size], F32);
    let (k, v) =
        (normal(2, &[3, 1, key_heads, size], F32), normal(3, &[3, 1, key_heads, value_size], F32));
    let before = Tensor::of(&checked.kv.key_blocks().unwrap());
    let mut refuse = |[q, k, v]: [&Array; 3], options: FlashAttentionOptions| {
        let refusal = checked.kv.layer(&step).attend(q, k, v, options).unwrap_err().to_string();
        assert_eq!(Tensor::of(&checked.kv.key_blocks().unwrap()), before);
        refusal
    };
    let none = FlashAttentionOptions::default;
    let mask = Array::from_slice(&[true], &[1]);
    let starts = Array::from_slice(&[0, 3], &[2]);
    let key = Array::from_slice(&[1_u32; 2], &[2]);
    let segments = Some(Segments { queries: &starts, keys: &starts });
    let dropout = Some(AttentionDropout { probability: 0.5, key: &key });
    let slopes = normal(1, &[3, heads], F32);
    let half = k.as_dtype(Dtype::Float16).unwrap();
    let three = normal(1, &[3, 1, 3, size], F32);
    let two = normal(1, &[2, 1, heads, size], F32);
    for (arrays, options, expected) in [
        ([&q, &k, &v], FlashAttentionOptions { mask: Some(&mask), ..none() }, "mask must be none"),
        ([&q, &k, &v], FlashAttentionOptions { segments, ..none() }, "segments must be none"),
        ([&q, &k, &v], FlashAttentionOptions { dropout, ..none() }, "dropout must be none"),
        (
            [&q, &k, &v],
            FlashAttentionOptions { alibi_slopes: Some(&slopes), ..none() },
            "alibi_slopes must have shape [4]",
        ),
        ([&two, &k, &v], none(), "queries must have shape [3, 1, H, 8]"),
        ([&three, &k, &v], none(), "queries must have a multiple of H_kv = 2 heads"),
        ([&q, &q, &v], none(), "keys must have shape [3, 1, 2, 8]"),
        ([&q, &k, &k], none(), "values must have shape [3, 1, 2, 5]"),
        ([&q, &half, &v], none(), "keys must have dtype Float32"),
    ] {
        let refusal = refuse(arrays, options);
        assert!(refusal.starts_with(&format!("[PagedKv] {expected}")), "{refusal}");
    }
    let bad_scale = FlashAttentionOptions { scale: Some(f32::NAN), ..none() };
    assert!(refuse([&q, &k, &v], bad_scale).contains("scale must be finite"));
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let good = PagedKvOptions {
        blocks: 2,
        block_size: 4,
        num_kv_heads: 2,
        head_dim: 8,
        value_dim: None,
        dtype: Dtype::Float16,
        keys: BlockForm::Plain,
        values: BlockForm::Plain,
    };
    assert_eq!(good.token_bytes(), 2 * 2 * 8 * 2);
    assert_eq!(PagedKv::new(&good).unwrap().nbytes(), 2 * 4 * good.token_bytes());
    for bad in [
        PagedKvOptions { blocks: 1, ..good.clone() },
        PagedKvOptions { block_size: 0, ..good.clone() },
        PagedKvOptions { num_kv_heads: 0, ..good.clone() },
        PagedKvOptions { head_dim: -1, ..good.clone() },
        PagedKvOptions { value_dim: Some(0), ..good.clone() },
        PagedKvOptions { dtype: Dtype::Int32, ..good.clone() },
        PagedKvOptions { blocks: i32::MAX, ..good.clone() },
    ] {
        let refusal = PagedKv::new(&bad).unwrap_err().to_string();
        assert!(refusal.starts_with("[PagedKv] "), "{refusal}");
    }
}

#[test]
fn a_sequence_goes_into_a_file_and_into_another_pool() {
    let mut checked = Checked::new(F32);
    let other = checked.open(&[]);
    checked.append(other, &[1; 3]);
    let id = checked.open(&[]);
    checked.append(id, &[1, 0, 0, 1, 1, 0]);
    checked.step(&[other, id], 0, PLAIN, Layout::Bshd);
    let (keys, values) = checked.kv.read(&checked.pool, id).unwrap();
    assert_eq!((keys.shape(), values.shape()), (&[1, 6, 2, 8][..], &[1, 6, 2, 5][..]));
    let mut cache = SimpleKvCache::new();
    cache.update(&keys, &values, Layout::Bshd).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sequence.safetensors");
    save_caches(&path, &[&cache], "a model").unwrap();
    let loaded = load_caches(&path, "a model").unwrap();
    assert_eq!(loaded[0].len(), 6);

    let mut again = Checked::new(F32);
    let id = again.open(&[]);
    again.append(id, &[1, 0, 0, 1, 1, 0]);
    let step = again.pool.step(&[id], 0).unwrap();
    let rows = |array: &Array| array.swap_axes(0, 1).unwrap();
    again.kv.write(&step, &rows(&keys), &rows(&values)).unwrap();
    again.pool.computed(&step).unwrap();
    again.written.insert(id, 6);
    again.append(id, &[0, 1]);
    again.step(&[id], 0, PLAIN, Layout::Bshd);
    let refused = again.kv.write(&step, &keys, &rows(&values)).unwrap_err().to_string();
    assert_eq!(refused, "[PagedKv] keys must have shape [6, 1, 2, 8] but got [1, 6, 2, 8]");
    assert!(again.kv.read(&checked.pool, other).is_ok());
    let coarse = PagedPoolOptions { block_size: 8, ..PagedPoolOptions::new(4) };
    let mut coarse = PagedPool::new(coarse).unwrap();
    let id = coarse.open(&[], b"").unwrap();
    let refused = again.kv.read(&coarse, id).unwrap_err().to_string();
    assert_eq!(refused, "[PagedKv] pool must have blocks of 4 but got 8");
}

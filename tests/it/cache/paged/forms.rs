//! Blocks of 8 bits.

use mlx_primitives::{
    Backend,
    attention::{BlockForm, FlashAttentionOptions, KvCache},
    cache::{PagedKv, PagedKvOptions, PagedPool, PagedStep, SequenceId},
};
use mlx_rs::{Array, Dtype};

use super::{
    checked::{
        ASKED, BLOCK, BLOCKS, Checked, F32, HEADS, PLAIN, assert_as_close_as_said, kv, numbers,
        pool,
    },
    fork_and_go_on, run_at_random, run_on, write_in_place,
};
use crate::support::{
    FLOATING, host,
    sample::{Random, normal},
    tensor::Tensor,
};

use BlockForm::{Fp8, Int8, Plain};

/// Of keys and of values.
const FORMS: [[BlockForm; 2]; 5] =
    [[Int8, Int8], [Fp8, Fp8], [Plain, Int8], [Int8, Fp8], [Fp8, Plain]];

#[test]
fn random_operations_attend_to_what_the_blocks_hold() {
    for (seed, forms) in (10..).zip(FORMS) {
        println!("seed {seed}, {forms:?}");
        let mut random = Random::new(seed);
        let checked = Checked::in_forms(FLOATING[seed as usize % 3], forms);
        run_at_random(checked, &mut random, ASKED[seed as usize % ASKED.len()]);
    }
}

#[test]
fn every_backend_attends_in_every_form() {
    let backends = if host::install() { Backend::ALL } else { &[Backend::Reference] };
    for &backend in backends.iter().filter(|&&backend| backend != Backend::Builtin) {
        for forms in FORMS {
            for dtype in [F32, Dtype::Float16] {
                run_on(backend, Checked::in_forms(dtype, forms), PLAIN);
            }
            println!("checked: PagedKv of {forms:?} on {backend}");
        }
    }
}

#[test]
fn forks_copy_scales_too() {
    for forms in FORMS {
        fork_and_go_on(Checked::in_forms(F32, forms));
    }
}

#[test]
fn numbers_and_scales_are_written_in_place() {
    for forms in FORMS {
        write_in_place(Checked::in_forms(F32, forms));
    }
}

/// A pool with one sequence of as many tokens, and the step that writes them.
fn one_sequence(tokens: i32) -> (PagedPool, SequenceId, PagedStep) {
    let mut pool = pool();
    let id = pool.open(&[], b"").unwrap();
    pool.append(id, &vec![0; tokens as usize]).unwrap();
    let step = pool.step(&[id], 0).unwrap();
    (pool, id, step)
}

/// `[5, 1, H_kv, size]`: heads as they come, of zeros, with one number far above the others, of tiny and of huge numbers.
fn odd_heads(size: usize) -> Vec<f32> {
    let count = HEADS[1] * size;
    let mut heads = numbers(1, 0, 0, count);
    heads.extend(vec![0.0; count]);
    let mut peaked = numbers(1, 0, 1, count);
    peaked[1] = -900.0;
    heads.extend(peaked);
    heads.extend(numbers(1, 0, 2, count).iter().map(|x| x * 1e-6));
    heads.extend(numbers(1, 0, 3, count).iter().map(|x| x * 1e4));
    heads
}

#[test]
fn what_is_read_is_as_close_as_the_form_says() {
    for form in [Int8, Fp8] {
        let [_, heads, size, value_size] = HEADS;
        let mut kv = kv(F32, [form; 2]);
        let (pool, id, step) = one_sequence(5);
        let written = [size, value_size].map(odd_heads);
        let array = |side: usize| {
            let size = HEADS[2 + side] as i32;
            Array::from_slice(&written[side], &[5, 1, heads as i32, size])
        };
        kv.write(&step, &array(0), &array(1)).unwrap();
        let (keys, values) = kv.read(&pool, id).unwrap();
        for (read, written) in [keys, values].iter().zip(&written) {
            assert_eq!(read.dtype(), F32);
            let read = Tensor::of(read);
            let size = *read.shape.last().unwrap();
            for (head, written) in read.rows().zip(written.chunks(size)) {
                let written: Vec<_> = written.iter().copied().map(f64::from).collect();
                assert_as_close_as_said(form, head, &written);
            }
        }

        // What was read can be written again, and is the same.
        let (mut again, rows) = (super::checked::kv(F32, [form; 2]), Array::swap_axes);
        let (keys, values) = kv.read(&pool, id).unwrap();
        again.write(&step, &rows(&keys, 0, 1).unwrap(), &rows(&values, 0, 1).unwrap()).unwrap();
        assert_eq!(Tensor::of(&again.key_blocks().unwrap()), Tensor::of(&kv.key_blocks().unwrap()));
        assert_eq!(
            Tensor::of(&again.value_blocks().unwrap()),
            Tensor::of(&kv.value_blocks().unwrap())
        );
    }
}

/// How far the numbers of a head are from those that were written, as a root mean square.
fn error(form: BlockForm, written: &Array) -> f64 {
    let size = written.dim(3);
    let options = PagedKvOptions {
        blocks: 64,
        block_size: BLOCK,
        num_kv_heads: written.dim(2),
        head_dim: size,
        value_dim: None,
        dtype: F32,
        keys: form,
        values: form,
    };
    let mut kv = PagedKv::new(&options).unwrap();
    let (pool, id, step) = one_sequence(written.dim(0));
    kv.write(&step, written, written).unwrap();
    let (read, written) = (Tensor::of(&kv.read(&pool, id).unwrap().0), Tensor::of(written));
    let squares = read.values.iter().zip(&written.values).map(|(read, x)| (read - x).powi(2));
    (squares.sum::<f64>() / written.values.len() as f64).sqrt()
}

#[test]
fn the_figures_of_the_documentation_hold() {
    let normal = normal(7, &[100, 1, 4, 128], F32);
    for (form, said) in [(Plain, 0.0), (Int8, 0.006), (Fp8, 0.026)] {
        let found = error(form, &normal);
        assert!((found - said).abs() <= 5e-4, "{form:?}: {found}");
    }
    // One number a hundred times above the others, which Int8 rounds by up to 0.4 and Fp8 by a sixteenth.
    let mut peaked = Tensor::of(&normal);
    peaked.values.iter_mut().step_by(128).for_each(|x| *x = 100.0);
    let peaked = peaked.to_array(F32);
    assert!(error(Int8, &peaked) > 5.0 * error(Fp8, &peaked));
}

#[test]
fn what_is_no_number_stays_in_its_head() {
    for form in [Int8, Fp8] {
        for strange in [f32::NAN, f32::INFINITY] {
            let mut kv = kv(F32, [form; 2]);
            let (pool, id, step) = one_sequence(1);
            let mut keys = numbers(1, 0, 0, 16);
            keys[3] = strange;
            let keys = Array::from_slice(&keys, &[1, 1, 2, 8]);
            kv.write(&step, &keys, &normal(2, &[1, 1, 2, 5], F32)).unwrap();
            let (keys, values) = kv.read(&pool, id).unwrap();
            let keys = Tensor::of(&keys).values;
            assert!(keys[..8].iter().any(|x| !x.is_finite()), "{form:?}: {keys:?}");
            assert!(keys[8..].iter().all(|x| x.is_finite()), "{form:?}: {keys:?}");
            assert!(Tensor::of(&values).values.iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn each_side_takes_the_room_of_its_form() {
    let bytes = |keys, values, dtype| {
        let options = PagedKvOptions {
            blocks: BLOCKS,
            block_size: BLOCK,
            num_kv_heads: 2,
            head_dim: 64,
            value_dim: Some(40),
            dtype,
            keys,
            values,
        };
        let slots = (BLOCKS * BLOCK) as usize;
        let kv = PagedKv::new(&options).unwrap();
        assert_eq!(kv.nbytes(), slots * options.token_bytes(), "{options:?}");
        assert_eq!(
            (kv.key_scales().unwrap().is_some(), kv.value_scales().unwrap().is_some()),
            (keys != Plain, values != Plain)
        );
        options.token_bytes()
    };
    assert_eq!(bytes(Plain, Plain, F32), 2 * 4 * (64 + 40));
    assert_eq!(bytes(Plain, Plain, Dtype::Bfloat16), 2 * 2 * (64 + 40));
    for dtype in FLOATING {
        assert_eq!(bytes(Int8, Fp8, dtype), 2 * (64 + 4 + 40 + 4));
    }
    assert_eq!(bytes(Fp8, Plain, Dtype::Float16), 2 * (64 + 4 + 2 * 40));
    assert_eq!(bytes(Plain, Int8, F32), 2 * (4 * 64 + 40 + 4));
}

#[test]
fn a_refused_step_changes_no_scale() {
    for forms in FORMS {
        let mut kv = kv(F32, forms);
        let (_, _, step) = one_sequence(3);
        let [q, k, v] =
            [[3, 1, 4, 8], [3, 1, 2, 8], [3, 1, 2, 5]].map(|shape| normal(1, &shape, F32));
        kv.write(&step, &k, &v).unwrap();
        let before: Vec<_> = kv.arrays().map(Tensor::of).collect();
        // Numbers as the blocks hold them are not what is written.
        let (stored, half) =
            (k.as_dtype(Dtype::Int8).unwrap(), v.as_dtype(Dtype::Float16).unwrap());
        for [k, v] in [[&stored, &v], [&k, &half], [&v, &v]] {
            let refused = kv.write(&step, k, v).unwrap_err().to_string();
            assert!(refused.starts_with("[PagedKv] "), "{refused}");
            let options = FlashAttentionOptions::default();
            let refused = kv.layer(&step).attend(&q, k, v, options).unwrap_err().to_string();
            assert!(refused.starts_with("[PagedKv] "), "{refused}");
        }
        let bad = FlashAttentionOptions { scale: Some(f32::NAN), ..Default::default() };
        assert!(kv.layer(&step).attend(&q, &k, &v, bad).is_err());
        assert_eq!(kv.arrays().map(Tensor::of).collect::<Vec<_>>(), before);
    }
}

//! New tokens into the blocks of a pool, by the kernel alone.

use mlx_primitives::{
    Layout,
    kernel::{Call, Constant, Kernel, Launch, Plan},
    kernels,
    rope::RopeStyle,
};
use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp},
};

use crate::rope::oracle::{Oracle, frequencies};
use crate::support::{
    FLOATING,
    compare::{Tolerance, assert_close},
    e4m3, host,
    sample::{normal, strided},
    tensor::Tensor,
};

fn kernel(name: &str) -> &'static Kernel {
    kernels().find(|kernel| kernel.name == name).unwrap()
}

/// Tokens, heads, heads of keys, the sizes of a key and of a value.
type Sizes = [i32; 5];

/// What a pool holds before.
const BEFORE: f32 = 0.5;

/// The slots of all tokens but the last; two of them are none.
const SLOTS: [i32; 6] = [7, 0, -1, 3, 9, 10];
const POOL_SLOTS: i32 = 10;

struct Pool {
    numbers: Array,
    scales: Array,
    dtype: Dtype,
}

impl Pool {
    fn new(dtype: Dtype, heads: i32, size: i32) -> Self {
        let fill = |shape: &[i32], dtype: Dtype| {
            let one = match dtype {
                Dtype::Int8 | Dtype::Uint8 => 3.0,
                _ => BEFORE,
            };
            let array = mlx_rs::ops::full::<f32>(shape, Array::from_f32(one)).unwrap();
            let array = array.as_dtype(dtype).unwrap();
            array.eval().unwrap();
            array
        };
        let scales = if scaled(dtype) { [1, POOL_SLOTS, heads] } else { [1, 8, 1] };
        let numbers = fill(&[1, POOL_SLOTS, heads, size], dtype);
        Self { numbers, scales: fill(&scales, Dtype::Float32), dtype }
    }

    /// The scale and the numbers of a head in a slot, as they are stored.
    fn head(&self, slot: i32, head: i32) -> (f64, Vec<f64>) {
        let [_, _, heads, size] = [0, 1, 2, 3].map(|axis| self.numbers.dim(axis) as usize);
        let row = slot as usize * heads + head as usize;
        let numbers = Tensor::of(&self.numbers.as_dtype(Dtype::Float32).unwrap());
        let scale =
            if scaled(self.dtype) { self.scales.as_slice::<f32>()[row].into() } else { 1.0 };
        let row = numbers.rows().nth(row).unwrap();
        assert_eq!(row.len(), size);
        (scale, row.to_vec())
    }
}

fn scaled(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Int8 | Dtype::Uint8)
}

/// Asserts that `stored` stands for a head of `numbers`, each as near as there is one.
fn assert_stored(what: &str, dtype: Dtype, (scale, stored): &(f64, Vec<f64>), numbers: &[f64]) {
    if !scaled(dtype) {
        assert_eq!(stored, numbers, "{what}");
        return;
    }
    let largest = if dtype == Dtype::Int8 { 127.0 } else { 448.0 };
    let peak = numbers.iter().map(|x| x.abs()).fold(0.0, f64::max);
    let expected = (peak / largest).max(1e-30);
    assert!((scale / expected - 1.0).abs() < 1e-6, "{what}: {scale} for {expected}");
    for (&stored, &number) in stored.iter().zip(numbers) {
        let wanted = number / scale;
        let (found, nearest) = match dtype {
            Dtype::Int8 => (stored, wanted.round()),
            _ => {
                let all = (0..=255).map(e4m3).filter(|x| !x.is_nan());
                let nearer = |a: &f64, b: &f64| (a - wanted).abs().total_cmp(&(b - wanted).abs());
                (e4m3(stored as u8), all.min_by(nearer).unwrap())
            }
        };
        // In the middle between two, either is as near.
        let off = (found - wanted).abs() - (nearest - wanted).abs();
        assert!(off.abs() <= 1e-5 * peak / scale, "{what}: {found} for {wanted}");
    }
}

/// Of all tokens together.
fn count_of_heads(rows: &Array) -> usize {
    rows.size() / rows.dim(3) as usize
}

/// How the heads of queries and keys turn.
#[derive(Debug, Clone, Copy)]
struct Turning {
    dims: i32,
    style: RopeStyle,
    magnitude: f32,
}

/// Of tokens.
const POSITIONS: [i32; 7] = [3, 0, 100_000, 7, 1, 5, 2];

const UNTURNED: Turning = Turning { dims: 0, style: RopeStyle::HalfSplit, magnitude: 1.0 };

impl Turning {
    const BASE: f64 = 100.0;

    /// As the kernel takes it: what each pair turns by at each position, in units of 2^-64 turns.
    fn turns(self) -> Array {
        let inverse = frequencies(self.dims.max(2), Self::BASE);
        let turns = inverse.iter().map(|radians| radians / std::f64::consts::TAU);
        let turns = turns.map(|turns| (turns * 2.0_f64.powi(64)) as u64).collect::<Vec<_>>();
        Array::from_slice(&turns, &[turns.len() as i32])
    }

    /// `rows`, a row for each token in either layout.
    fn of(self, rows: &Array) -> Tensor {
        let oracle = Oracle {
            style: self.style,
            layout: if rows.dim(1) == 1 { Layout::Bshd } else { Layout::Bhsd },
            frequencies: frequencies(self.dims, Self::BASE),
            magnitude: self.magnitude.into(),
            starts: POSITIONS.iter().map(|&position| position.into()).collect(),
        };
        oracle.rotate(&Tensor::of(rows))
    }
}

fn append(tokens: [&Array; 3], turning: Turning, slots: &Array, pools: &[Pool; 2]) -> Array {
    let [keys, values] = pools;
    let [queries, key_rows, value_rows] = tokens;
    let count = queries.dim(0);
    let positions = Array::from_slice(&POSITIONS[..count as usize], &[count]);
    let (positions, slots) = (strided(&positions), strided(slots));
    let turns = turning.turns();
    let inputs = [
        queries,
        key_rows,
        value_rows,
        &positions,
        &turns,
        &slots,
        &keys.numbers,
        &values.numbers,
        &keys.scales,
        &values.scales,
    ];
    let simdgroups = (count_of_heads(queries) + 2 * count_of_heads(key_rows)) as u32;
    let launch =
        Launch { groups: [simdgroups.div_ceil(4), 1, 1], group: [128, 1, 1], threadgroup_bytes: 0 };
    let mut constants = pools.each_ref().map(|pool| Constant::Bool(scaled(pool.dtype))).to_vec();
    constants.extend([
        Constant::Int(turning.dims),
        Constant::Bool(turning.style == RopeStyle::Interleaved),
        Constant::Float(turning.magnitude),
    ]);
    let extents = vec![("heads", queries.dim(1) * queries.dim(2))];
    let plan = Plan { constants, extents, launch };
    let call = Call::new(kernel("append_to_blocks"), &inputs, plan).unwrap();
    // SAFETY: the pools are of this test alone, and the launch has a simdgroup for each head of each token.
    let passed = unsafe { call.run_unchecked() }.unwrap().remove(0);
    passed.eval().unwrap();
    passed
}

/// How tokens lie in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lie {
    /// In rows, heads first.
    Rows,
    /// Every other number of an array, tokens first.
    Strided,
    /// Heads first, all heads of a token in one array, as of one size a layer makes them.
    Together,
}

use Lie::{Rows, Strided, Together};

/// Queries, keys and values.
fn tokens(sizes: Sizes, dtype: Dtype, lie: Lie) -> [Array; 3] {
    let [count, heads, key_heads, size, value_size] = sizes;
    let tokens = [(heads, size), (key_heads, size), (key_heads, value_size)];
    let parts = [0, 1, 2].map(|n: usize| {
        let (heads, size) = tokens[n];
        let shape = match lie {
            Strided => [count, 1, heads, size],
            Rows | Together => [count, heads, 1, size],
        };
        let array = normal(7 + n as u64, &shape, dtype);
        if lie == Strided { strided(&array) } else { array }
    });
    if lie != Together {
        return parts;
    }
    let together = concatenate(&parts, 1).unwrap();
    let parts = together.split_at_indices(&[heads, heads + key_heads], 1).unwrap();
    parts.try_into().unwrap()
}

/// `[T, H, D]` of a row for each token in either layout.
fn in_heads(rows: &Array) -> Array {
    rows.reshape(&[rows.dim(0), rows.dim(1) * rows.dim(2), rows.dim(3)]).unwrap()
}

fn check(sizes: Sizes, dtype: Dtype, stored: [Dtype; 2], lie: Lie) {
    let what = format!("{sizes:?} {dtype:?} {stored:?} {lie:?}");
    let [count, _, key_heads, size, value_size] = sizes;
    let tokens = tokens(sizes, dtype, lie);
    let pools =
        [Pool::new(stored[0], key_heads, size), Pool::new(stored[1], key_heads, value_size)];
    let slots = Array::from_slice(&SLOTS[..count as usize - 1], &[count - 1]);
    let passed = append(tokens.each_ref(), UNTURNED, &slots, &pools);
    assert_close(&what, &passed, &Tensor::of(&in_heads(&tokens[0])), Tolerance::EXACT);

    for (pool, rows) in pools.iter().zip(&tokens[1..]) {
        let rows = Tensor::of(rows);
        let mut rows = rows.rows();
        let mut left: Vec<i32> = (0..POOL_SLOTS).collect();
        for &slot in &SLOTS[..count as usize - 1] {
            for head in 0..key_heads {
                let numbers = rows.next().unwrap();
                if left.contains(&slot) {
                    let what = format!("{what}: slot {slot}, head {head}");
                    assert_stored(&what, pool.dtype, &pool.head(slot, head), numbers);
                }
            }
            left.retain(|&other| other != slot);
        }
        let untouched = Pool::new(pool.dtype, key_heads, pool.numbers.dim(3));
        for slot in left {
            for head in 0..key_heads {
                assert_eq!(
                    pool.head(slot, head),
                    untouched.head(slot, head),
                    "{what}: slot {slot}"
                );
            }
        }
    }
}

#[test]
fn tokens_go_where_they_belong_and_nowhere_else() {
    if !host::install() {
        return;
    }
    for dtype in FLOATING {
        for (sizes, lie) in [
            ([7, 4, 2, 16, 16], Rows),
            ([7, 3, 1, 5, 9], Strided),
            ([2, 2, 2, 128, 64], Strided),
            ([3, 4, 2, 24, 24], Together),
            // More than a slot for each thread of a simdgroup.
            ([2, 2, 1, 600, 264], Rows),
        ] {
            check(sizes, dtype, [dtype; 2], lie);
        }
    }
}

#[test]
fn eight_bits_hold_what_is_nearest() {
    if !host::install() {
        return;
    }
    use Dtype::{Float32, Int8, Uint8};
    for stored in [[Int8, Uint8], [Uint8, Int8]] {
        for (sizes, lie) in [([7, 4, 2, 40, 16], Rows), ([3, 2, 1, 128, 7], Strided)] {
            check(sizes, Float32, stored, lie);
        }
    }
    check([2, 2, 1, 264, 300], Float32, [Int8, Uint8], Rows);
    check([3, 2, 1, 64, 32], Dtype::Bfloat16, [Int8, Dtype::Bfloat16], Rows);
    check([3, 2, 1, 64, 32], Dtype::Float16, [Dtype::Float16, Uint8], Rows);
}

/// Keys go, turned, into slots of their own, of a plain pool and of one of 8 bits.
fn check_turned(sizes: Sizes, dtype: Dtype, turning: Turning, lie: Lie) {
    let what = format!("{sizes:?} {dtype:?} {turning:?} {lie:?}");
    let [count, _, key_heads, size, value_size] = sizes;
    let tokens = tokens(sizes, dtype, lie);
    let slots = Array::from_slice(&(0..count).collect::<Vec<_>>(), &[count]);
    let append = |stored: Dtype| {
        let pools = [Pool::new(stored, key_heads, size), Pool::new(stored, key_heads, value_size)];
        (append(tokens.each_ref(), turning, &slots, &pools), pools)
    };
    let tolerance = Tolerance::of("rope_qk", dtype);
    let (passed, [keys, values]) = append(dtype);
    let turned = |rows: &Array| turning.of(rows).to_array(Dtype::Float32);
    assert_close(&what, &passed, &Tensor::of(&in_heads(&turned(&tokens[0]))), tolerance);
    let held = |pool: &Pool| pool.numbers.squeeze_axes(&[0]).unwrap();
    let first = |array: Array| array.try_index(..count).unwrap();
    let expected = Tensor::of(&in_heads(&turned(&tokens[1])));
    assert_close(&what, &first(held(&keys)), &expected, tolerance);
    let expected = Tensor::of(&in_heads(&tokens[2]));
    assert_close(&what, &first(held(&values)), &expected, Tolerance::EXACT);

    // What is rounded to 8 bits is what a plain pool holds.
    for stored in [Dtype::Int8, Dtype::Uint8] {
        let (again, [rounded, _]) = append(stored);
        assert_close(&what, &again, &Tensor::of(&passed), Tolerance::EXACT);
        for (slot, head) in (0..count).flat_map(|slot| (0..key_heads).map(move |h| (slot, h))) {
            let (_, numbers) = keys.head(slot, head);
            assert_stored(&what, stored, &rounded.head(slot, head), &numbers);
        }
    }
}

#[test]
fn queries_and_keys_turn_on_the_way() {
    if !host::install() {
        return;
    }
    use RopeStyle::{HalfSplit, Interleaved};
    for dtype in FLOATING {
        for (sizes, dims, style, lie) in [
            ([7, 4, 2, 16, 16], 16, HalfSplit, Rows),
            ([7, 3, 1, 10, 9], 6, Interleaved, Strided),
            ([5, 2, 1, 128, 64], 128, HalfSplit, Rows),
            ([3, 2, 2, 96, 32], 32, HalfSplit, Strided),
            ([3, 2, 2, 64, 64], 64, Interleaved, Rows),
            ([3, 4, 2, 32, 32], 32, Interleaved, Together),
            ([4, 3, 1, 20, 20], 10, HalfSplit, Together),
            ([2, 2, 1, 600, 40], 560, HalfSplit, Rows),
        ] {
            let magnitude = if dims == 32 { 1.25 } else { 1.0 };
            check_turned(sizes, dtype, Turning { dims, style, magnitude }, lie);
        }
    }
}

#[test]
fn heads_of_nothing_and_of_no_number_are_stored_too() {
    if !host::install() {
        return;
    }
    let row = |last: f32| {
        let numbers = (0..31).map(|n| n as f32 - 15.0).chain([last]).collect::<Vec<_>>();
        Array::from_slice(&numbers, &[1, 1, 1, 32])
    };
    for dtype in [Dtype::Int8, Dtype::Uint8] {
        for (keys, is_number) in [
            (mlx_rs::ops::zeros::<f32>(&[1, 1, 1, 32]).unwrap(), true),
            (row(f32::NAN), false),
            (row(f32::INFINITY), false),
        ] {
            let pools = [Pool::new(dtype, 1, 32), Pool::new(dtype, 1, 32)];
            append([&keys, &keys, &keys], UNTURNED, &Array::from_slice(&[4], &[1]), &pools);
            let (scale, stored) = pools[0].head(4, 0);
            for stored in stored {
                let stored = if dtype == Dtype::Int8 { stored } else { e4m3(stored as u8) };
                let found = stored * scale;
                assert!(if is_number { found == 0.0 } else { found.is_nan() }, "{dtype:?} {found}");
            }
        }
    }
}

/// A pool in which every number tells its place, and what it is made of: `[1, SLOTS, H, D]` or `[1, SLOTS, H]`.
fn numbered(dtype: Dtype, shape: &[i32]) -> Array {
    let count = shape.iter().product::<i32>();
    let numbers = (0..count).map(|n| (n % 101) as f32).collect::<Vec<_>>();
    let array = Array::from_slice(&numbers, shape).as_dtype(dtype).unwrap();
    array.eval().unwrap();
    array
}

fn check_copies(dtype: Dtype, block: i32, heads: i32, sizes: [i32; 2]) {
    let slots = 6 * block;
    let with_scales = |slots: i32| if scaled(dtype) { [1, slots, heads] } else { [1, 8, 1] };
    let [size, value_size] = sizes;
    let pools = || {
        [
            numbered(dtype, &[1, slots, heads, size]),
            numbered(dtype, &[1, slots, heads, value_size]),
            numbered(Dtype::Float32, &with_scales(slots)),
            numbered(Dtype::Float32, &with_scales(slots)),
        ]
    };
    // The last copies nothing from nowhere.
    let (from, to) = ([4, 1, 1, 6], [0, 5, 3, 2]);
    let token_slots = Array::from_slice(&[9, 8, 7], &[3]);
    let written = pools();
    let [from_array, to_array] = [from, to].map(|blocks| Array::from_slice(&blocks, &[4]));
    let queries = normal(3, &[3, 1, 2, 4], Dtype::Float32);
    let mut inputs = vec![&from_array, &to_array, &queries, &token_slots];
    inputs.extend(&written);
    let is_scaled = Constant::Bool(scaled(dtype));
    let constants = vec![is_scaled, is_scaled, Constant::Int(block)];
    let launch = Launch { groups: [2, 4, 1], group: [64, 1, 1], threadgroup_bytes: 0 };
    let plan = Plan { constants, extents: Vec::new(), launch };
    let call = Call::new(kernel("copy_blocks"), &inputs, plan).unwrap();
    // SAFETY: the pools are of this test alone, and no block is copied from and to.
    let passed = unsafe { call.run_unchecked() }.unwrap().remove(0);
    passed.eval().unwrap();
    assert_eq!(passed.as_slice::<i32>(), [9, 8, 7]);

    let arrays = if scaled(dtype) { 4 } else { 2 };
    for (written, before) in written.iter().zip(&pools()).take(arrays) {
        let flat = |array: &Array| {
            Tensor::of(&array.as_dtype(Dtype::Float32).unwrap().flatten(None, None).unwrap())
        };
        let (written, before) = (flat(written), flat(before));
        let (written, before) = (written.rows().next().unwrap(), before.rows().next().unwrap());
        let of_block = written.len() / 6;
        for (block, found) in (0..6).zip(written.chunks(of_block)) {
            let copied = from.iter().zip(&to).find(|(from, to)| **to == block && **from < 6);
            let source = copied.map_or(block, |(from, _)| *from) as usize;
            let expected = &before[source * of_block..][..of_block];
            assert_eq!(found, expected, "{dtype:?} {block} {sizes:?}: block {block}");
        }
    }
}

#[test]
fn blocks_are_copied_where_they_lie() {
    if !host::install() {
        return;
    }
    for dtype in [Dtype::Float32, Dtype::Bfloat16, Dtype::Int8, Dtype::Uint8] {
        check_copies(dtype, 16, 2, [8, 16]);
        check_copies(dtype, 3, 1, [5, 7]);
    }
}

/// Every e4m3 float from 2^-9 to 448 and what lies between two neighbours: in the middle, where of both the one with an even
/// fraction counts, and beside it. The largest is 448, so the scale is 1.
#[test]
fn e4m3_is_rounded_to_the_nearest_and_to_even() {
    if !host::install() {
        return;
    }
    let all: Vec<f64> = (0..0x7f).map(e4m3).collect();
    let mut numbers = Vec::new();
    let mut expected = Vec::new();
    for (bits, pair) in (0_u8..).zip(all.windows(2)) {
        let (low, middle) = (pair[0], (pair[0] + pair[1]) / 2.0);
        let even = if bits % 2 == 0 { bits } else { bits + 1 };
        let beside = middle * 1e-3;
        for (number, stored) in
            [(low, bits), (middle - beside, bits), (middle, even), (middle + beside, bits + 1)]
        {
            numbers.extend([number as f32, -number as f32]);
            expected.extend([stored, stored | 0x80]);
        }
    }
    numbers.push(448.0);
    expected.push(0x7e);
    let size = numbers.len() as i32;
    let rows = Array::from_slice(&numbers, &[1, 1, 1, size]);
    let pools = [Pool::new(Dtype::Uint8, 1, size), Pool::new(Dtype::Uint8, 1, size)];
    append([&rows, &rows, &rows], UNTURNED, &Array::from_slice(&[4], &[1]), &pools);
    let (scale, stored) = pools[0].head(4, 0);
    assert!((scale - 1.0).abs() < 1e-12, "{scale}");
    for ((stored, expected), number) in stored.into_iter().zip(expected).zip(numbers) {
        assert_eq!(stored as u8, expected, "{number}");
    }
}

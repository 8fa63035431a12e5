//! Layouts and patterns: plain data, no arrays.

use mlx_primitives::attention::{BlockLayout, BlockPattern};

use super::linear_support::refusal;

const NONE: BlockPattern = BlockPattern {
    before: 0,
    after: 0,
    global_blocks: 0,
    random_blocks: 0,
    seed: 0,
    causal: false,
};

fn rows(pattern: BlockPattern, size: i32, queries: i32, keys: i32) -> Vec<Vec<i32>> {
    let layout = pattern.layout(size, queries, keys).unwrap();
    assert_eq!(layout.block_size(), size);
    assert_eq!(
        i64::from(layout.key_blocks()),
        (i64::from(keys) + i64::from(size) - 1) / i64::from(size)
    );
    layout.rows().to_vec()
}

#[test]
fn patterns_are_as_drawn_by_hand() {
    assert_eq!(rows(NONE, 4, 10, 10), [[0], [1], [2]]);
    let near = BlockPattern { before: 1, after: 2, ..NONE };
    assert_eq!(
        rows(near, 4, 17, 17),
        [&[0, 1, 2][..], &[0, 1, 2, 3], &[1, 2, 3, 4], &[2, 3, 4], &[3, 4],]
    );
    let causal = BlockPattern { causal: true, ..near };
    assert_eq!(rows(causal, 4, 12, 12), [&[0][..], &[0, 1], &[1, 2]]);
    let global = BlockPattern { global_blocks: 1, ..NONE };
    assert_eq!(rows(global, 4, 16, 16), [&[0, 1, 2, 3][..], &[0, 1], &[0, 2], &[0, 3]]);
    let both = BlockPattern { causal: true, global_blocks: 2, ..NONE };
    assert_eq!(rows(both, 4, 16, 16), [&[0][..], &[0, 1], &[0, 1, 2], &[0, 1, 3]]);
    assert_eq!(rows(BlockPattern { global_blocks: 9, ..NONE }, 4, 8, 8), [[0, 1], [0, 1]]);
    assert_eq!(rows(NONE, 4, 0, 8), Vec::<Vec<i32>>::new());
    assert_eq!(rows(global, 4, 5, 0), [Vec::<i32>::new(), Vec::new()]);
}

#[test]
fn the_last_query_stands_at_the_last_key() {
    // Queries 0 to 4 stand at keys 6 to 10; the second block, of one query, at 10.
    assert_eq!(rows(NONE, 4, 5, 11), [&[1, 2][..], &[2]]);
    // Queries 0 to 5 stand at −4 to 1.
    assert_eq!(rows(NONE, 4, 6, 2), [&[][..], &[0]]);
    assert_eq!(rows(BlockPattern { after: 1, ..NONE }, 4, 6, 2), [[0], [0]]);
    assert_eq!(
        rows(BlockPattern { global_blocks: 1, ..NONE }, 4, 9, 5),
        [&[0][..], &[0, 1], &[0, 1]]
    );
    assert_eq!(rows(BlockPattern { after: 1, causal: true, ..NONE }, 4, 6, 2), [&[][..], &[0]]);
}

#[test]
fn random_blocks_are_new_ones_and_as_many_as_asked() {
    for causal in [false, true] {
        for seed in 0..20 {
            let pattern = BlockPattern {
                before: 1,
                after: 1,
                global_blocks: 2,
                random_blocks: 3,
                seed,
                causal,
            };
            let sure = BlockPattern { random_blocks: 0, ..pattern };
            let (drawn, sure) = (rows(pattern, 8, 160, 160), rows(sure, 8, 160, 160));
            for (row, (drawn, sure)) in drawn.iter().zip(&sure).enumerate() {
                let last = if causal { row as i32 } else { 19 };
                let free = (0..=last).filter(|block| !sure.contains(block)).count();
                assert!(sure.iter().all(|block| drawn.contains(block)), "{row}: {drawn:?}");
                assert_eq!(drawn.len(), sure.len() + free.min(3), "{row}: {drawn:?}");
                assert!(drawn.is_sorted_by(|a, b| a < b) && drawn.iter().all(|&b| b <= last));
            }
        }
    }
}

#[test]
fn random_blocks_are_blocks_also_before_the_first_key() {
    for (before, after, global_blocks) in [(0, 0, 1), (1, 0, 2), (0, 3, 1), (2, 2, 0)] {
        for (size, queries, keys) in [(4, 40, 20), (4, 41, 17), (2, 60, 5)] {
            let pattern = BlockPattern { before, after, global_blocks, random_blocks: 3, ..NONE };
            let sure = rows(BlockPattern { random_blocks: 0, ..pattern }, size, queries, keys);
            let blocks = (keys + size - 1) / size;
            let mut drawn = vec![0; blocks as usize];
            for seed in 0..40 {
                for (row, sure) in
                    rows(BlockPattern { seed, ..pattern }, size, queries, keys).iter().zip(&sure)
                {
                    assert!(row.iter().all(|block| (0..blocks).contains(block)), "{row:?}");
                    let free = blocks as usize - sure.len();
                    assert_eq!(row.len(), sure.len() + free.min(3), "{row:?} of {sure:?}");
                    row.iter().for_each(|&block| drawn[block as usize] += 1);
                }
            }
            assert!(drawn.iter().all(|&times| times > 0), "{drawn:?}");
        }
    }
}

#[test]
fn random_blocks_depend_on_the_seed_alone_and_favour_none() {
    let of = |seed| rows(BlockPattern { random_blocks: 2, seed, ..NONE }, 1, 16, 16);
    assert_eq!(of(3), of(3));
    assert_ne!(of(3), of(4));
    assert_ne!(of(0)[5], of(0)[6], "rows draw apart");
    let mut counts = [0; 16];
    for seed in 0..3000 {
        of(seed)[7]
            .iter()
            .filter(|&&block| block != 7)
            .for_each(|&block| counts[block as usize] += 1);
    }
    // 400 of 6000 draws each, with a deviation of 19.
    let fair = |(block, &count): (usize, &i32)| block == 7 || (320..480).contains(&count);
    assert!(counts.iter().enumerate().all(fair), "{counts:?}");
}

#[test]
fn rows_are_put_in_order() {
    let layout = BlockLayout::new(8, 4, vec![vec![3, 0, 3], vec![]]).unwrap();
    assert_eq!(layout.rows(), [&[0, 3][..], &[]]);
    assert_eq!((layout.block_size(), layout.key_blocks()), (8, 4));
}

#[test]
fn what_cannot_be_laid_out_is_refused() {
    let new = |size, blocks, row| refusal(BlockLayout::new(size, blocks, vec![vec![row]]));
    let form = "[BlockLayout]";
    assert_eq!(new(0, 2, 0), format!("{form} block_size must be at least 1 but got 0"));
    assert_eq!(new(1, -1, 0), format!("{form} key_blocks must be at least 0 but got -1"));
    for row in [-1, 2] {
        let expected = format!("{form} rows must list blocks from 0 to below 2 but got {row}");
        assert_eq!(new(1, 2, row), expected);
    }
    let lay =
        |pattern: BlockPattern, size, queries, keys| refusal(pattern.layout(size, queries, keys));
    let least = |name: &str, least: i32, got: i32| {
        format!("[BlockPattern] {name} must be at least {least} but got {got}")
    };
    assert_eq!(lay(NONE, 0, 4, 4), least("block_size", 1, 0));
    assert_eq!(lay(NONE, 1, -4, 4), least("query_length", 0, -4));
    assert_eq!(lay(NONE, 1, 4, -4), least("key_length", 0, -4));
    assert_eq!(lay(BlockPattern { before: -1, ..NONE }, 1, 4, 4), least("before", 0, -1));
    assert_eq!(lay(BlockPattern { after: -1, ..NONE }, 1, 4, 4), least("after", 0, -1));
    let global = BlockPattern { global_blocks: -1, ..NONE };
    assert_eq!(lay(global, 1, 4, 4), least("global_blocks", 0, -1));
    let random = BlockPattern { random_blocks: -1, ..NONE };
    assert_eq!(lay(random, 1, 4, 4), least("random_blocks", 0, -1));
}

#[test]
fn enormous_counts_mean_all() {
    let most = i32::MAX;
    let all = BlockPattern {
        before: most,
        after: most,
        global_blocks: 0,
        random_blocks: most,
        seed: u64::MAX,
        causal: false,
    };
    assert_eq!(rows(all, 4, 12, 12), [[0, 1, 2]; 3]);
    assert_eq!(rows(BlockPattern { before: 0, after: 0, ..all }, 4, 12, 12), [[0, 1, 2]; 3]);
    assert_eq!(rows(all, most, 12, 12), [[0]]);
}

//! Random bits that depend on a request's seed and a position, and on nothing else.

use mlx_rs::{Array, Dtype, ops::stack};

use crate::{error::Result, splitmix::scramble, uploads::numbers};

/// What the draws of a request are made from, what the coin of its XTC, and what decides on tokens that are proposed to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Draw,
    Coin,
    Verdict,
}

/// The key of a seed: odd, and well mixed, for the generator wants irregular bits.
pub(super) fn key(seed: u64, stream: Stream) -> u64 {
    let apart = match stream {
        Stream::Draw => 0,
        Stream::Coin => 0x5851_F42D_4C95_7F2D,
        Stream::Verdict => 0x1405_7B7E_F767_814F,
    };
    scramble(scramble(seed) ^ apart) | 1
}

/// Sixty-four bits for each key and position, all `[N]`: keys and result u64, positions integers.
///
/// Two words of the counter-based generator of Widynski,
/// [Squares](https://arxiv.org/abs/2004.06278), 2020, at twice the position and the number after.
pub(super) fn bits(keys: &Array, positions: &Array) -> Result<Array> {
    let twice = positions.as_dtype(Dtype::Uint64)?.multiply(numbers(vec![2]))?;
    let counters = stack(&[&twice, &twice.add(numbers(vec![1]))?], 0)?;
    let words = squares(&counters, keys)?;
    // Counters are multiplied by 2^32 and 1: both words in one.
    let places = numbers(vec![1 << 32, 1]).reshape(&[2, 1])?;
    Ok(words.multiply(places)?.sum_axis(0, false)?)
}

/// The upper half of the fourth round, as a u64 below 2^32.
fn squares(counters: &Array, keys: &Array) -> Result<Array> {
    let half = numbers(vec![1 << 32]);
    let y = counters.multiply(keys)?;
    let z = y.add(keys)?;
    let mut x = y.clone();
    for added in [&y, &z, &y] {
        let sum = x.multiply(&x)?.add(added)?;
        // The halves change places.
        x = sum.floor_divide(&half)?.add(sum.multiply(&half)?)?;
    }
    Ok(x.multiply(&x)?.add(z)?.floor_divide(half)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The generator as it is published, on one number.
    fn word(counter: u64, key: u64) -> u64 {
        let y = counter.wrapping_mul(key);
        let z = y.wrapping_add(key);
        let round = |x: u64, added: u64| x.wrapping_mul(x).wrapping_add(added);
        let x = round(y, y).rotate_left(32);
        let x = round(x, z).rotate_left(32);
        let x = round(x, y).rotate_left(32);
        round(x, z) >> 32
    }

    #[test]
    fn arrays_give_the_words_of_single_numbers() {
        let keys: Vec<_> = (0..40).map(|seed| key(seed, Stream::Draw)).collect();
        let positions: Vec<_> = (0..40).map(|i| [0, 1, i, i32::MAX - i][i as usize % 4]).collect();
        let size = [keys.len() as i32];
        let found =
            bits(&Array::from_slice(&keys, &size), &Array::from_slice(&positions, &size)).ok();
        let expected = keys.iter().zip(&positions).map(|(&key, &position)| {
            let counter = 2 * position as u64;
            word(counter, key) << 32 | word(counter + 1, key)
        });
        let found = found.map(|bits| bits.as_slice::<u64>().to_vec());
        assert_eq!(found, Some(expected.collect()));
    }

    const STREAMS: [Stream; 3] = [Stream::Draw, Stream::Coin, Stream::Verdict];

    #[test]
    fn keys_are_odd_and_apart() {
        let keys = (0..1000).flat_map(|seed| STREAMS.map(|stream| key(seed, stream)));
        let keys: std::collections::HashSet<_> = keys.filter(|key| key % 2 == 1).collect();
        assert_eq!(keys.len(), 3000);
    }
}

//! What a request's steps remember of its text.

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::scatter_add_single, minimum, select, stack, zeros_dtype},
};

use super::{
    SamplingParams, Step,
    batch::dry_of,
    params::{Dry, check_ids},
    places::places,
    steps::DryRows,
    weights::MAX_VOCABULARY,
};
use crate::{check::Check, error::Result, uploads};

const OP: &str = "TokenHistory";

/// What the steps of one request remember of its text: how often each token came, the last tokens,
/// and the bound of Mirostat. It holds nothing that the request's parameters do not ask for, and
/// lives on the device, so that decoding may run ahead of the host.
///
/// A clone is another continuation of the same text.
#[derive(Debug, Clone)]
pub struct TokenHistory {
    pub(super) vocabulary: i32,
    pub(super) generated: u32,
    /// `[V]` each.
    pub(super) counts: Option<Counts>,
    /// `[W]` each.
    pub(super) recent: Option<Recent>,
    /// `[1]`.
    pub(super) bound: Option<Array>,
}

/// Which tokens the prompt has, bool, and how often each is in the output, f32.
#[derive(Debug, Clone)]
pub(super) struct Counts {
    pub(super) prompt: Array,
    pub(super) output: Array,
}

/// The last tokens, i32 and -1 before the first; and for each place how many tokens up to it equal
/// as many at the end, i32, 0 at the end itself.
#[derive(Debug, Clone)]
pub(super) struct Recent {
    pub(super) tokens: Array,
    pub(super) lengths: Array,
}

impl TokenHistory {
    /// The history of a request whose text so far is `prompt` and then `output`.
    ///
    /// A request that goes on where it was interrupted gets what it had drawn as `output`, and then
    /// has the history that it had before, but for the bound of Mirostat, which starts anew.
    ///
    /// # Errors
    /// When `params` does not pass its [`check`](SamplingParams::check), or when a token of `prompt`
    /// or `output` is not below `vocabulary`, or `vocabulary` above 2^20.
    pub fn new(
        params: &SamplingParams,
        vocabulary: i32,
        prompt: &[u32],
        output: &[u32],
    ) -> Result<Self> {
        params.check(vocabulary)?;
        check_vocabulary(OP, vocabulary)?;
        check_ids(OP, "prompt", prompt, vocabulary)?;
        check_ids(OP, "output", output, vocabulary)?;
        let active = params.active();
        let remembers = |step| active.contains(&step);
        let dry = params.dry.as_ref().filter(|_| remembers(Step::Dry));
        let mirostat = params.mirostat.filter(|_| remembers(Step::Mirostat));
        Ok(Self {
            vocabulary,
            generated: output.len() as u32,
            counts: remembers(Step::Penalties).then(|| Counts::of(vocabulary, prompt, output)),
            recent: dry.map(|dry| Recent::of(dry, prompt, output)),
            bound: mirostat.map(|mirostat| Array::from_slice(&[2.0 * mirostat.tau], &[1])),
        })
    }

    /// Whether it remembers what a request with `params` asks for, and nothing else.
    pub(super) fn serves(&self, params: &SamplingParams) -> bool {
        let active = params.active();
        let remembers = |step| active.contains(&step);
        let range = params.dry.as_ref().filter(|_| remembers(Step::Dry)).map(|dry| dry.range);
        let window = self.recent.as_ref().map(|recent| recent.tokens.dim(-1).unsigned_abs());
        self.counts.is_some() == remembers(Step::Penalties)
            && window == range
            && self.bound.is_some() == remembers(Step::Mirostat)
    }

    /// The history with one more token of output, that a sampler of `params` need not have drawn.
    ///
    /// # Errors
    /// When the history is not that of `params`, when `token` is not below the vocabulary, or where there is a Mirostat, which
    /// follows what a sampler draws.
    pub fn push(&self, params: &SamplingParams, token: u32) -> Result<Self> {
        let check = Check::op(OP);
        check.value(self.serves(params), "params", "be those of the history", "others")?;
        check.value(self.bound.is_none(), "params", "have no Mirostat", "one")?;
        check_ids(OP, "token", &[token], self.vocabulary)?;
        let token = uploads::integers(vec![token.cast_signed()]);
        let counts = self
            .counts
            .as_ref()
            .map(|counts| Counts::stack(std::slice::from_ref(counts))?.push(&token)?.row(0));
        let recent = self.recent.as_ref().map(|recent| {
            Recent::stack(std::slice::from_ref(recent))?.push(&token, &dry_of(params))?.row(0)
        });
        let generated = self.generated + 1;
        let (counts, recent) = (counts.transpose()?, recent.transpose()?);
        Ok(Self { vocabulary: self.vocabulary, generated, counts, recent, bound: None })
    }

    /// How many tokens the output has.
    pub fn generated(&self) -> u32 {
        self.generated
    }
}

pub(super) fn check_vocabulary(op: &'static str, vocabulary: i32) -> Result<()> {
    let fits = (1..=MAX_VOCABULARY).contains(&vocabulary);
    Check::op(op).value(fits, "vocabulary", "be from 1 to 2^20", vocabulary)
}

impl Counts {
    fn of(vocabulary: i32, prompt: &[u32], output: &[u32]) -> Self {
        let size = vocabulary.unsigned_abs() as usize;
        let (mut seen, mut counts) = (vec![false; size], vec![0.0_f32; size]);
        prompt.iter().for_each(|&token| seen[token as usize] = true);
        output.iter().for_each(|&token| counts[token as usize] += 1.0);
        Self {
            prompt: Array::from_slice(&seen, &[vocabulary]),
            output: Array::from_slice(&counts, &[vocabulary]),
        }
    }

    /// Those of a request that has none.
    pub(super) fn none(vocabulary: i32) -> Result<Self> {
        Ok(Self {
            prompt: zeros_dtype(&[vocabulary], Dtype::Bool)?,
            output: zeros_dtype(&[vocabulary], Dtype::Float32)?,
        })
    }

    pub(super) fn stack(rows: &[Self]) -> Result<Self> {
        let of = |part: fn(&Self) -> &Array| stack_all(rows.iter().map(part));
        Ok(Self { prompt: of(|row| &row.prompt)?, output: of(|row| &row.output)? })
    }

    pub(super) fn row(&self, row: i32) -> Result<Self> {
        let of = |array: &Array| array.take_axis(uploads::int(row), 0);
        Ok(Self { prompt: of(&self.prompt)?, output: of(&self.output)? })
    }

    /// One more of each row's token, `[N]`.
    pub(super) fn push(&self, tokens: &Array) -> Result<Self> {
        let shape = self.output.shape();
        let one = Array::full::<f32>(&[shape[0], 1], uploads::float(1.0))?;
        let flat = self.output.reshape(&[-1])?;
        let output = scatter_add_single(flat, places(tokens, shape[1])?, one, 0)?;
        Ok(Self { prompt: self.prompt.clone(), output: output.reshape(shape)? })
    }
}

impl Recent {
    fn of(dry: &Dry, prompt: &[u32], output: &[u32]) -> Self {
        let window = dry.range as usize;
        let text: Vec<_> = prompt.iter().chain(output).map(|&token| token as i32).collect();
        let last = &text[text.len().saturating_sub(window)..];
        let mut tokens = vec![-1; window - last.len()];
        tokens.extend_from_slice(last);
        let breaks = |token: i32| dry.breakers.iter().any(|&breaker| breaker as i32 == token);
        let lengths = repetitions(&tokens, breaks);
        let size = [window as i32];
        Self {
            tokens: Array::from_slice(&tokens, &size),
            lengths: Array::from_slice(&lengths, &size),
        }
    }

    /// That of a request that has none.
    pub(super) fn none(window: i32) -> Self {
        let size = window.unsigned_abs() as usize;
        Self {
            tokens: Array::from_slice(&vec![-1; size], &[window]),
            lengths: Array::from_slice(&vec![0; size], &[window]),
        }
    }

    pub(super) fn stack(rows: &[Self]) -> Result<Self> {
        let of = |part: fn(&Self) -> &Array| stack_all(rows.iter().map(part));
        Ok(Self { tokens: of(|row| &row.tokens)?, lengths: of(|row| &row.lengths)? })
    }

    pub(super) fn row(&self, row: i32) -> Result<Self> {
        let of = |array: &Array| array.take_axis(uploads::int(row), 0);
        Ok(Self { tokens: of(&self.tokens)?, lengths: of(&self.lengths)? })
    }

    /// Goes on by each row's token, `[N]`.
    pub(super) fn push(&self, tokens: &Array, rows: &DryRows) -> Result<Self> {
        let window = self.tokens.dim(-1);
        let token = tokens.as_dtype(Dtype::Int32)?.expand_dims(-1)?;
        let kept = self.tokens.take_axis(Array::arange::<_, u32>(1, window, None)?, -1)?;
        let tokens = concatenate(&[&kept, &token], -1)?;
        // A text that ended at one place before goes on by this token, if it stands here; and the
        // place before in the new count is this one in the old.
        let place = Array::arange::<_, i32>(1, window + 1, None)?;
        let longer = minimum(self.lengths.add(uploads::int(1))?, &place)?;
        let last = place.eq(uploads::int(window))?;
        let goes_on = tokens.eq(&token)?.logical_and(rows.breaks(&token)?.logical_not()?)?;
        let goes_on = goes_on.logical_and(last.logical_not()?)?;
        Ok(Self { tokens, lengths: select(goes_on, longer, uploads::int(0))? })
    }
}

/// For each place, how many tokens up to it equal as many at the end, up to the nearest that breaks.
///
/// Gusfield's Z-values of the text read backwards: each comparison that succeeds moves `right` on, so all take `O(n)`.
fn repetitions(tokens: &[i32], breaks: impl Fn(i32) -> bool) -> Vec<i32> {
    let length = tokens.len();
    let back = |place: usize| tokens[length - 1 - place];
    let same =
        |one: usize, other: usize| back(one) == back(other) && back(one) >= 0 && !breaks(back(one));
    let mut counts = vec![0; length];
    let (mut left, mut right) = (0, 0);
    for place in 1..length {
        let known = if place < right { (right - place).min(counts[place - left]) } else { 0 };
        let more = (known..length - place).take_while(|&next| same(next, place + next)).count();
        counts[place] = known + more;
        if place + counts[place] > right {
            (left, right) = (place, place + counts[place]);
        }
    }
    counts.iter().rev().map(|&count| count as i32).collect()
}

pub(super) fn stack_all<'a>(rows: impl Iterator<Item = &'a Array>) -> Result<Array> {
    Ok(stack(&rows.collect::<Vec<_>>(), 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splitmix::scramble;

    #[test]
    fn repetitions_end_at_what_breaks_them() {
        let text = [1, 2, 3, 9, 1, 2, 3, 1, 2, 3];
        assert_eq!(repetitions(&text, |_| false), [0, 0, 3, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(repetitions(&text, |token| token == 2), [0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(repetitions(&[-1, -1, -1], |_| false), [0; 3]);
        assert_eq!(repetitions(&[5, 5, 5, 5], |_| false), [1, 2, 3, 0]);
        assert_eq!(repetitions(&[], |_| false), [0; 0]);
    }

    #[test]
    fn repetitions_are_those_that_are_counted_one_by_one() {
        let mut state = 1;
        for _ in 0..2000 {
            let mut random = |bound: u64| {
                state += 1;
                scramble(state) % bound
            };
            let length = random(30);
            let text = (0..length).map(|_| random(4) as i32 - 1).collect::<Vec<_>>();
            let breaks = |token| token == 2;
            let counted = (0..text.len()).map(|place| {
                let pairs = text[..=place].iter().rev().zip(text.iter().rev());
                let same = pairs.take_while(|&(a, b)| a == b && *a >= 0 && !breaks(*a));
                if place + 1 == text.len() { 0 } else { same.count() as i32 }
            });
            assert_eq!(repetitions(&text, breaks), counted.collect::<Vec<_>>(), "{text:?}");
        }
    }

    #[test]
    fn a_long_text_of_one_token_takes_no_longer() {
        assert_eq!(repetitions(&[1; 1 << 20], |_| false)[(1 << 20) - 2], (1 << 20) - 1);
    }
}

//! Which of the blocks that nobody uses is let go first.

use crate::{check::Check, error::Result};

/// How a pool ranks the blocks that no sequence uses any more, and that are kept in case that a prompt begins with them.
///
/// Blocks in use are never let go, and of a chain of blocks the last one goes first, because a block is found only by
/// those before it.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum Eviction {
    /// The one that was used longest ago.
    #[default]
    Lru,
    /// The one that was filled first.
    Fifo,
    /// The one that drew the least attention, of what [`PagedPool::credit`](super::PagedPool::credit) was told.
    AttentionScore {
        /// How much of a block's score stays when it is told a new one: 0 or more, below 1.
        decay: f32,
    },
    /// The one with the lowest sum of what each policy ranks it at, from 0 to 1, times its weight.
    Composite(Vec<(Eviction, f32)>),
}

/// What policies look at.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct History {
    /// When it was filled.
    pub(super) filled: u64,
    /// When a sequence last took it up or let it go.
    pub(super) used: u64,
    pub(super) score: f32,
}

impl Eviction {
    pub(super) fn check(&self, check: Check) -> Result<()> {
        match self {
            Self::Lru | Self::Fifo => Ok(()),
            Self::AttentionScore { decay } => {
                let holds = (0.0..1.0).contains(decay);
                check.value(holds, "decay", "be at least 0 and below 1", decay)
            }
            Self::Composite(parts) => {
                check.value(!parts.is_empty(), "eviction", "combine at least one policy", 0)?;
                parts.iter().try_for_each(|(part, weight)| {
                    check.non_negative("weight", *weight)?;
                    part.check(check)
                })
            }
        }
    }

    /// How much of a score stays; that of the first policy that looks at scores.
    pub(super) fn decay(&self) -> Option<f32> {
        match self {
            Self::Lru | Self::Fifo => None,
            Self::AttentionScore { decay } => Some(*decay),
            Self::Composite(parts) => parts.iter().find_map(|(part, _)| part.decay()),
        }
    }

    /// A number for each, lower for those to be let go before.
    pub(super) fn ranks(&self, histories: &[History]) -> Vec<f64> {
        let each = |rank: fn(&History) -> f64| histories.iter().map(rank).collect();
        match self {
            Self::Lru => each(|history| history.used as f64),
            Self::Fifo => each(|history| history.filled as f64),
            Self::AttentionScore { .. } => each(|history| history.score.into()),
            Self::Composite(parts) => {
                let mut sums = vec![0.0; histories.len()];
                for (part, weight) in parts {
                    let ranks = from_0_to_1(part.ranks(histories));
                    sums.iter_mut().zip(ranks).for_each(|(sum, r)| *sum += f64::from(*weight) * r);
                }
                sums
            }
        }
    }
}

fn from_0_to_1(ranks: Vec<f64>) -> Vec<f64> {
    let least = ranks.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ranks.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = if most > least { most - least } else { 1.0 };
    ranks.into_iter().map(|rank| (rank - least) / span).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: Check = Check::op("PagedPool");

    fn histories() -> [History; 3] {
        [(1, 9, 0.5), (2, 7, 0.1), (3, 8, 0.9)].map(|(filled, used, score)| History {
            filled,
            used,
            score,
        })
    }

    fn first(eviction: &Eviction) -> usize {
        let ranks = eviction.ranks(&histories());
        (0..3).min_by(|&a, &b| ranks[a].total_cmp(&ranks[b])).unwrap_or_default()
    }

    #[test]
    fn each_policy_has_its_own_first() {
        assert_eq!(first(&Eviction::Lru), 1);
        assert_eq!(first(&Eviction::Fifo), 0);
        assert_eq!(first(&Eviction::AttentionScore { decay: 0.9 }), 1);
    }

    #[test]
    fn weights_decide_among_combined_policies() {
        let both =
            |lru, fifo| Eviction::Composite(vec![(Eviction::Lru, lru), (Eviction::Fifo, fifo)]);
        assert_eq!(first(&both(1.0, 0.1)), 1);
        assert_eq!(first(&both(0.1, 1.0)), 0);
        assert_eq!(both(1.0, 0.5).ranks(&histories()), [1.0, 0.25, 1.0]);
        let alike = [History::default(); 2];
        assert_eq!(both(1.0, 1.0).ranks(&alike), [0.0, 0.0]);
    }

    #[test]
    fn policies_that_cannot_be_are_refused() {
        for bad in [
            Eviction::AttentionScore { decay: 1.0 },
            Eviction::AttentionScore { decay: f32::NAN },
            Eviction::Composite(Vec::new()),
            Eviction::Composite(vec![(Eviction::Lru, -1.0)]),
            Eviction::Composite(vec![(Eviction::Composite(Vec::new()), 1.0)]),
        ] {
            assert!(bad.check(CHECK).is_err(), "{bad:?}");
        }
        let nested = vec![(Eviction::AttentionScore { decay: 0.5 }, 1.0)];
        let nested = Eviction::Composite(vec![(Eviction::Composite(nested), 2.0)]);
        assert!(nested.check(CHECK).is_ok());
        assert_eq!(nested.decay(), Some(0.5));
    }
}

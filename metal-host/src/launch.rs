//! How a kernel is launched, and how one run of it is arranged.

use std::time::Duration;

/// The geometry of a launch, in threads, as `metal_kernel` counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Threads along each axis, over all groups.
    pub grid: [u32; 3],
    /// Threads of one group along each axis; groups at the grid's edge are smaller.
    pub group: [u32; 3],
}

impl Launch {
    /// The most threads of one group.
    pub const MAX_GROUP: u64 = 1024;

    /// The threads of a whole group.
    pub fn group_threads(&self) -> u64 {
        self.group.iter().fold(1, |all, &axis| all.saturating_mul(axis.into()))
    }
}

/// What a kernel's text is compiled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Build {
    /// Nothing: the results, and what the runtime itself sees.
    Plain,
    /// AddressSanitizer and UndefinedBehaviorSanitizer: accesses beyond an array, bad shifts, misaligned vectors.
    Address,
    /// ThreadSanitizer: races, within a threadgroup and between threadgroups.
    Thread,
    /// MemorySanitizer: decisions and outputs that depend on memory that nothing wrote.
    Memory,
}

impl Build {
    /// Every build, in the order of the ladder.
    pub const ALL: [Build; 4] = [Build::Plain, Build::Address, Build::Thread, Build::Memory];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Build::Plain => "plain",
            Build::Address => "address",
            Build::Thread => "thread",
            Build::Memory => "memory",
        }
    }
}

/// One run of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// What it is compiled with.
    pub build: Build,
    /// The order in which threads and groups go on: 0 in order, 1 reversed, else the seed of a random one.
    pub schedule: u64,
    /// What fills threadgroup memory and outputs before.
    pub poison: u8,
    /// What MLX fills the outputs with instead, its `init_value`.
    pub init_value: Option<f32>,
    /// Whether the compiler may fuse `a * b + c`, as Apple's may: results may then differ in the last place.
    pub fast_contract: bool,
    /// How long the run may take.
    pub time_limit: Duration,
}

impl Default for Run {
    fn default() -> Self {
        Run {
            build: Build::Plain,
            schedule: 0,
            poison: 0xff,
            init_value: None,
            fast_contract: false,
            time_limit: Duration::from_secs(20),
        }
    }
}

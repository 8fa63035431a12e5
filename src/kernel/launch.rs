//! The geometry of a launch.

use crate::{check::Check, error::Result, target::Target};

/// How many threads run a kernel, and in what groups.
///
/// Groups are counted rather than threads, so that each is full on every device; a kernel guards what its last group
/// has too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Groups along each axis.
    pub groups: [u32; 3],
    /// Threads of one group along each axis.
    pub group: [u32; 3],
    /// Threadgroup memory of one group, in bytes.
    pub threadgroup_bytes: u32,
}

impl Launch {
    /// The most threads of one group, on Apple GPUs and NVIDIA's alike.
    pub const MAX_GROUP: u32 = 1024;

    /// The most threads of one group along the last axis, which is NVIDIA's limit.
    pub const MAX_GROUP_DEPTH: u32 = 64;

    /// The most groups along the second and third axes, which is NVIDIA's limit.
    pub const MAX_GROUPS_ASIDE: u32 = 65535;

    /// The most threads along one axis: MLX counts them in an `i32`.
    pub const MAX_THREADS: u32 = i32::MAX as u32;

    /// The most threadgroup memory of a group on every GPU, in bytes, which is Apple's limit.
    pub const MAX_THREADGROUP_BYTES: u32 = 32 * 1024;

    /// The most threadgroup memory of a group on every device of this kind, in bytes: 48 KiB on NVIDIA's.
    pub const fn most_threadgroup_bytes(target: Target) -> u32 {
        match target {
            Target::Cuda => 48 * 1024,
            Target::Cpu | Target::Metal => Self::MAX_THREADGROUP_BYTES,
        }
    }

    /// The same for a kernel whose one array is a `LARGE_THREADGROUP_ARRAY`: 99 KiB on NVIDIA's GPUs since Ampere, and on
    /// hosts that act them out.
    pub const fn most_large_threadgroup_bytes(target: Target) -> u32 {
        match target {
            Target::Cuda | Target::Cpu => 99 * 1024,
            Target::Metal => Self::MAX_THREADGROUP_BYTES,
        }
    }

    /// Checks that every GPU of this kind can run it.
    ///
    /// # Errors
    /// When an axis is empty, or one of the limits above is exceeded.
    pub fn check(&self, kernel: &'static str, target: Target) -> Result<()> {
        self.check_within(Self::most_threadgroup_bytes(target), kernel)
    }

    pub(super) fn check_within(&self, most_bytes: u32, kernel: &'static str) -> Result<()> {
        let check = Check::op(kernel);
        let covers = self.groups.iter().chain(&self.group).all(|&count| count > 0);
        check.value(covers, "launch", "have threads along every axis", format_args!("{self:?}"))?;
        let at_most = |name, limit: u32, value: u64| {
            check.value(value <= limit.into(), name, format_args!("be at most {limit}"), value)
        };
        let threads = self.group.iter().map(|&axis| u64::from(axis)).product();
        at_most("threads of a group", Self::MAX_GROUP, threads)?;
        at_most("depth of a group", Self::MAX_GROUP_DEPTH, self.group[2].into())?;
        at_most("threadgroup_bytes", most_bytes, self.threadgroup_bytes.into())?;
        for aside in &self.groups[1..] {
            at_most("groups", Self::MAX_GROUPS_ASIDE, (*aside).into())?;
        }
        for (groups, group) in self.groups.iter().zip(&self.group) {
            let threads = u64::from(*groups) * u64::from(*group);
            at_most("threads along an axis", Self::MAX_THREADS, threads)?;
        }
        Ok(())
    }

    /// Threads along each axis, over all groups.
    pub fn grid(&self) -> [u32; 3] {
        std::array::from_fn(|axis| self.groups[axis].saturating_mul(self.group[axis]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAUNCH: Launch =
        Launch { groups: [16, 1, 1], group: [256, 1, 1], threadgroup_bytes: 1024 };

    #[test]
    fn a_launch_within_every_limit_passes() {
        for launch in [
            LAUNCH,
            Launch { group: [32, 32, 1], threadgroup_bytes: 32768, ..LAUNCH },
            Launch { groups: [1, 65535, 65535], ..LAUNCH },
        ] {
            assert!(launch.check("op", Target::Metal).is_ok(), "{launch:?}");
        }
        let larger = Launch { threadgroup_bytes: 49152, ..LAUNCH };
        assert!(larger.check("op", Target::Cuda).is_ok());
    }

    #[test]
    fn each_limit_is_held() {
        for launch in [
            Launch { groups: [0, 1, 1], ..LAUNCH },
            Launch { group: [256, 0, 1], ..LAUNCH },
            Launch { group: [1025, 1, 1], ..LAUNCH },
            Launch { group: [u32::MAX, u32::MAX, 1], ..LAUNCH },
            Launch { group: [1, 1, 65], ..LAUNCH },
            Launch { groups: [1, 65536, 1], ..LAUNCH },
            Launch { groups: [u32::MAX, 1, 1], ..LAUNCH },
            Launch { groups: [8_388_608, 1, 1], ..LAUNCH },
            Launch { threadgroup_bytes: 32769, ..LAUNCH },
        ] {
            assert!(launch.check("op", Target::Metal).is_err(), "{launch:?}");
        }
    }

    #[test]
    fn the_grid_is_made_of_full_groups() {
        assert_eq!(LAUNCH.grid(), [4096, 1, 1]);
    }
}

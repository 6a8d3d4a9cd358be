// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Memory statistics that the guest sends.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Memory Statistics", and
//! `struct virtio_balloon_stat`. The names are those of QEMU's property `guest-stats`.

/// The tag of a statistic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum StatTag {
    /// Bytes swapped in since boot.
    SwapIn = 0,
    /// Bytes swapped out since boot.
    SwapOut = 1,
    /// Major page faults since boot.
    MajorFaults = 2,
    /// Minor page faults since boot.
    MinorFaults = 3,
    /// Unused memory in bytes.
    FreeMemory = 4,
    /// Total memory in bytes.
    TotalMemory = 5,
    /// Memory in bytes that new programs could allocate without swapping.
    AvailableMemory = 6,
    /// Page cache in bytes.
    DiskCaches = 7,
    /// Huge pages allocated since boot.
    HugetlbAllocations = 8,
    /// Huge page allocations that failed since boot.
    HugetlbFailures = 9,
    /// Processes that the OOM killer killed since boot.
    OomKills = 10,
    /// Allocations since boot that entered direct reclaim.
    AllocationStalls = 11,
    /// Bytes that background reclaim scanned since boot.
    AsyncScanned = 12,
    /// Bytes that direct reclaim scanned since boot.
    DirectScanned = 13,
    /// Bytes that background reclaim reclaimed since boot.
    AsyncReclaimed = 14,
    /// Bytes that direct reclaim reclaimed since boot.
    DirectReclaimed = 15,
}

impl StatTag {
    /// All tags, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::SwapIn,
        Self::SwapOut,
        Self::MajorFaults,
        Self::MinorFaults,
        Self::FreeMemory,
        Self::TotalMemory,
        Self::AvailableMemory,
        Self::DiskCaches,
        Self::HugetlbAllocations,
        Self::HugetlbFailures,
        Self::OomKills,
        Self::AllocationStalls,
        Self::AsyncScanned,
        Self::DirectScanned,
        Self::AsyncReclaimed,
        Self::DirectReclaimed,
    ];

    /// Returns the tag with this number, or `None` if the number is unknown.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Returns the number of the tag on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// Returns QEMU's name for the statistic.
    pub const fn qemu_name(self) -> &'static str {
        match self {
            Self::SwapIn => "stat-swap-in",
            Self::SwapOut => "stat-swap-out",
            Self::MajorFaults => "stat-major-faults",
            Self::MinorFaults => "stat-minor-faults",
            Self::FreeMemory => "stat-free-memory",
            Self::TotalMemory => "stat-total-memory",
            Self::AvailableMemory => "stat-available-memory",
            Self::DiskCaches => "stat-disk-caches",
            Self::HugetlbAllocations => "stat-htlb-pgalloc",
            Self::HugetlbFailures => "stat-htlb-pgfail",
            Self::OomKills => "stat-oom-kills",
            Self::AllocationStalls => "stat-alloc-stalls",
            Self::AsyncScanned => "stat-async-scans",
            Self::DirectScanned => "stat-direct-scans",
            Self::AsyncReclaimed => "stat-async-reclaims",
            Self::DirectReclaimed => "stat-direct-reclaims",
        }
    }
}

/// One statistic on the wire: ten bytes without padding, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The raw tag. [`StatTag::from_number`] returns `None` for tags that this code does not
    /// define.
    pub tag: u16,
    /// The value, in the unit of the tag.
    pub value: u64,
}

impl Stat {
    /// The size of a statistic on the wire in bytes.
    pub const SIZE: usize = 10;

    /// Returns the statistic as its bytes on the wire.
    pub const fn to_bytes(self) -> [u8; Self::SIZE] {
        let [t0, t1] = self.tag.to_le_bytes();
        let [v0, v1, v2, v3, v4, v5, v6, v7] = self.value.to_le_bytes();
        [t0, t1, v0, v1, v2, v3, v4, v5, v6, v7]
    }

    /// Returns the statistic that the bytes on the wire contain.
    pub const fn from_bytes(bytes: [u8; Self::SIZE]) -> Self {
        let [t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] = bytes;
        Self {
            tag: u16::from_le_bytes([t0, t1]),
            value: u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_numbered_without_gaps() {
        for (n, tag) in StatTag::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(tag.number()), n);
            assert_eq!(StatTag::from_number(tag.number()), Some(tag));
        }
        assert_eq!(StatTag::from_number(16), None);
        assert_eq!(StatTag::FreeMemory.qemu_name(), "stat-free-memory");
    }

    #[test]
    fn a_statistic_is_ten_little_endian_bytes() {
        let stat = Stat {
            tag: 0x0201,
            value: 0x0a09_0807_0605_0403,
        };
        assert_eq!(stat.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        assert_eq!(Stat::from_bytes(stat.to_bytes()), stat);
    }
}

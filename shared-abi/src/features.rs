// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! The feature bits of a balloon.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Feature bits".

use core::fmt;
use core::ops::{BitAnd, BitOr, Not};

/// A set of virtio feature bits, numbered as on the wire: bit `n` is `1 << n`.
///
/// Bits that are not a balloon's (transport and ring features) may be in the set; they are kept
/// and mean nothing here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// No feature at all: inflate and deflate only.
    pub const NONE: Self = Self(0);
    /// Bit 0: the driver tells the device before it uses a page from the balloon again.
    pub const MUST_TELL_HOST: Self = Self(1 << 0);
    /// Bit 1: there is a statistics queue.
    pub const STATS_VQ: Self = Self(1 << 1);
    /// Bit 2: the driver takes pages back by itself when the guest runs out of memory.
    pub const DEFLATE_ON_OOM: Self = Self(1 << 2);
    /// Bit 3: there is a free page queue, and a command id in config space.
    pub const FREE_PAGE_HINT: Self = Self(1 << 3);
    /// Bit 4: `poison_val` in config space says what the guest fills its free pages with.
    pub const PAGE_POISON: Self = Self(1 << 4);
    /// Bit 5: there is a reporting queue.
    pub const REPORTING: Self = Self(1 << 5);
    /// Bit 63, private to this project and in no specification: the driver keeps a hinted block
    /// until the device has returned the block's buffer.
    ///
    /// Only then may a device change or discard a hinted page (not merely skip sending it): a
    /// driver without this promise may have given the page to somebody else before the device
    /// sees the hint. The highest bit is the farthest from what the specification will assign.
    pub const KEEPS_HINTED_UNTIL_RETURNED: Self = Self(1 << 63);

    /// Every feature bit that a balloon gives a meaning, with the name this project gives it in
    /// command lines and reports.
    pub const NAMES: [(Self, &'static str); 7] = [
        (Self::MUST_TELL_HOST, "must-tell-host"),
        (Self::STATS_VQ, "stats"),
        (Self::DEFLATE_ON_OOM, "deflate-on-oom"),
        (Self::FREE_PAGE_HINT, "free-page-hint"),
        (Self::PAGE_POISON, "page-poison"),
        (Self::REPORTING, "free-page-reporting"),
        (Self::KEEPS_HINTED_UNTIL_RETURNED, "discard-hinted"),
    ];

    /// The set whose bits are those of `bits`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The set as a bit mask, as it stands in the device's feature words.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether every bit of `other` is in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits of both.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The bits of `self` that are not in `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether no bit is set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The bit number of a set with exactly one bit, as `virtio_has_feature` wants it.
    ///
    /// For a set of several bits, the lowest of them; for the empty set 64, which is no bit.
    pub const fn bit_number(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// The one-bit set that bears `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(feature, _)| *feature)
    }

    /// The names of the balloon features in the set, lowest bit first.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES
            .iter()
            .filter(move |(feature, _)| self.contains(*feature))
            .map(|(_, name)| *name)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl BitAnd for Features {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for Features {
    type Output = Self;

    fn not(self) -> Self {
        Self(!self.0)
    }
}

/// Writes the names of the balloon features, separated by commas.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, name) in self.names().enumerate() {
            if n > 0 {
                f.write_str(",")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn names_round_trip_and_bits_are_those_of_the_specification() {
        for (n, (feature, name)) in Features::NAMES.iter().enumerate() {
            assert_eq!(Features::from_name(name), Some(*feature));
            let expected = if n == 6 { 63 } else { n as u32 };
            assert_eq!(feature.bit_number(), expected, "{name}");
        }
        assert_eq!(Features::from_name("no-such-feature"), None);
        let two = Features::STATS_VQ | Features::PAGE_POISON;
        assert_eq!(two.to_string(), "stats,page-poison");
        assert!(two.contains(Features::STATS_VQ));
        assert!(!two.contains(Features::STATS_VQ | Features::REPORTING));
        assert_eq!(two.without(Features::STATS_VQ), Features::PAGE_POISON);
        assert_eq!(two & !Features::STATS_VQ, Features::PAGE_POISON);
        assert_eq!(Features::NONE.bit_number(), 64);
        assert!(Features::NONE.is_empty());
    }
}

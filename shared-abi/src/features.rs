// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Feature bits of the balloon.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Feature bits".

use core::fmt;
use core::ops::{BitAnd, BitOr, Not};

/// A set of virtio feature bits: bit `n` is `1 << n`.
///
/// The set may contain bits that are not specific to the balloon (transport and ring features).
/// They are kept, and have no meaning here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// No feature: inflate and deflate only.
    pub const NONE: Self = Self(0);
    /// Bit 0: the driver notifies the device before it uses a page of the balloon again.
    pub const MUST_TELL_HOST: Self = Self(1 << 0);
    /// Bit 1: the statistics queue exists.
    pub const STATS_VQ: Self = Self(1 << 1);
    /// Bit 2: OOM deflation. The driver deflates the balloon when the guest is out of memory.
    pub const DEFLATE_ON_OOM: Self = Self(1 << 2);
    /// Bit 3: the free page queue exists, and configuration space has a command id.
    pub const FREE_PAGE_HINT: Self = Self(1 << 3);
    /// Bit 4: `poison_val` in configuration space is the pattern that the guest fills free pages
    /// with.
    pub const PAGE_POISON: Self = Self(1 << 4);
    /// Bit 5: the reporting queue exists.
    pub const REPORTING: Self = Self(1 << 5);
    /// Bit 63, private to this project and not in the specification: the driver keeps a hinted
    /// block until the device has used its buffer.
    ///
    /// Only with this feature may a device change or discard a hinted page, instead of only not
    /// sending it: a driver without the feature may have returned the page to the guest before the
    /// device processes the hint. The highest bit is the least likely to be assigned by the
    /// specification.
    pub const KEEPS_HINTED_UNTIL_RETURNED: Self = Self(1 << 63);

    /// All feature bits of the balloon, with their names in command lines and reports of this
    /// project.
    pub const NAMES: [(Self, &'static str); 7] = [
        (Self::MUST_TELL_HOST, "must-tell-host"),
        (Self::STATS_VQ, "stats"),
        (Self::DEFLATE_ON_OOM, "deflate-on-oom"),
        (Self::FREE_PAGE_HINT, "free-page-hint"),
        (Self::PAGE_POISON, "page-poison"),
        (Self::REPORTING, "free-page-reporting"),
        (Self::KEEPS_HINTED_UNTIL_RETURNED, "discard-hinted"),
    ];

    /// Returns the set with the bits of `bits`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Returns the set as a bit mask, as in the feature words of the device.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns whether `self` contains all bits of `other`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns the union of both sets.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns the bits of `self` that are not in `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Returns whether no bit is set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Returns the number of the lowest bit in the set, as `virtio_has_feature` takes it.
    ///
    /// The set usually has one bit. For the empty set, returns 64, which is not a bit.
    pub const fn bit_number(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// Returns the feature with this name, or `None` if the name is unknown.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(feature, _)| *feature)
    }

    /// Returns the names of the balloon features in the set, in the order of
    /// [`NAMES`](Self::NAMES).
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

/// Writes the names of the balloon features in the set, separated by commas.
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

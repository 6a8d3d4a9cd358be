// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Command ids of free page hinting.
//!
//! The device shows one in config space; the driver repeats it on the free page queue when it
//! begins, and sends STOP when it ends. Source: virtio specification, "Traditional Memory Balloon
//! Device / Free Page Hinting", and `VIRTIO_BALLOON_CMD_ID_*`. The range of hinting ids is QEMU's
//! (`VIRTIO_BALLOON_FREE_PAGE_HINT_CMD_ID_MIN`); the rest below it is reserved for commands to come.
//!
//! A device issues ids of the range for hinting only: [`HintId`]. A driver must be more liberal, since
//! the specification tells it to answer every id from 2 on, and there are devices that count from 2
//! (Firecracker's): [`HintRoundId`].

/// The id of one round of hinting: `0x8000_0000 ..= u32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HintId(u32);

impl HintId {
    /// The lowest id.
    pub const FIRST: Self = Self(0x8000_0000);
    /// The highest id; its successor is [`FIRST`](Self::FIRST).
    pub const LAST: Self = Self(u32::MAX);

    /// The id with this number, or `None` outside the range.
    pub const fn new(number: u32) -> Option<Self> {
        if number >= Self::FIRST.0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number, as config space and queue show it.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The next id. Wraps inside the range, so that it never becomes STOP, DONE or reserved.
    #[must_use]
    pub const fn successor(self) -> Self {
        // Every id has the top bit set; a carry out of the lower 31 bits is the wrap.
        Self(self.0.wrapping_add(1) | Self::FIRST.0)
    }

    /// How many times [`successor`](Self::successor) leads from `earlier` to `self`:
    /// `0 ..= 0x7fff_ffff`.
    pub const fn steps_since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0) & (Self::FIRST.0 - 1)
    }
}

/// The id of a round as a driver takes it: `2 ..= u32::MAX`, everything but STOP and DONE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HintRoundId(u32);

impl HintRoundId {
    /// The number, as config space and queue show it.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl From<HintId> for HintRoundId {
    fn from(id: HintId) -> Self {
        Self(id.number())
    }
}

/// What a command id says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommandId {
    /// 0: hints are not wanted now; the driver keeps the blocks that it holds.
    Stop,
    /// 1: the device has no more use for the hinted blocks; the driver takes them back.
    Done,
    /// Below `0x8000_0000`, and neither STOP nor DONE: no device of this project issues it.
    Reserved(u32),
    /// A round of hinting.
    Hint(HintId),
}

impl CommandId {
    /// What this number says. Every number says something.
    pub const fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Stop,
            1 => Self::Done,
            _ => match HintId::new(number) {
                Some(id) => Self::Hint(id),
                None => Self::Reserved(number),
            },
        }
    }

    /// The round that the id asks a driver for; `None` for STOP and DONE.
    pub const fn hint_round(self) -> Option<HintRoundId> {
        match self.number() {
            0 | 1 => None,
            number => Some(HintRoundId(number)),
        }
    }

    /// The number, as config space and queue show it.
    pub const fn number(self) -> u32 {
        match self {
            Self::Stop => 0,
            Self::Done => 1,
            Self::Reserved(number) => number,
            Self::Hint(id) => id.number(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn r8_ids_wrap_inside_their_range() {
        assert_eq!(HintId::LAST.successor(), HintId::FIRST);
        assert_eq!(HintId::FIRST.successor().number(), 0x8000_0001);
        assert_eq!(HintId::FIRST.steps_since(HintId::LAST), 1);
        assert_eq!(HintId::LAST.steps_since(HintId::FIRST), 0x7fff_ffff);
        assert_eq!(HintId::new(0x7fff_ffff), None);
    }

    #[test]
    fn r8_stop_done_and_reserved_are_no_hint_ids() {
        assert_eq!(CommandId::from_number(0), CommandId::Stop);
        assert_eq!(CommandId::from_number(1), CommandId::Done);
        assert_eq!(CommandId::from_number(2), CommandId::Reserved(2));
        assert_eq!(
            CommandId::from_number(0x7fff_ffff),
            CommandId::Reserved(0x7fff_ffff)
        );
        assert_eq!(
            CommandId::from_number(0x8000_0000),
            CommandId::Hint(HintId::FIRST)
        );
    }

    #[test]
    fn a_driver_takes_every_id_from_2_on_as_a_round() {
        let hint_round = |number| {
            CommandId::from_number(number)
                .hint_round()
                .map(HintRoundId::number)
        };
        assert_eq!(hint_round(0), None);
        assert_eq!(hint_round(1), None);
        assert_eq!(hint_round(2), Some(2));
        assert_eq!(hint_round(u32::MAX), Some(u32::MAX));
    }

    proptest! {
        #[test]
        fn numbers_round_trip(number in any::<u32>()) {
            prop_assert_eq!(CommandId::from_number(number).number(), number);
        }

        #[test]
        fn r8_successor_is_one_step_and_in_range(number in 0x8000_0000u32..) {
            let id = HintId::new(number).unwrap();
            prop_assert!(id.successor().number() >= 0x8000_0000);
            prop_assert_eq!(id.successor().steps_since(id), 1);
        }
    }
}

// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 OR BSD-3-Clause

//! Command ids of free page hinting.
//!
//! The device shows a command id in configuration space. The driver sends the id on the free page
//! queue when it starts the hint round, and STOP when it ends the round.
//!
//! The device only issues ids of the range for hinting: [`HintId`]. The driver accepts more:
//! [`HintRoundId`]. The specification requires the driver to answer every id of 2 or greater, and
//! some devices (Firecracker) start at 2.
//!
//! Source: virtio specification, "Traditional Memory Balloon Device / Free Page Hinting", and
//! `VIRTIO_BALLOON_CMD_ID_*`. The range for hinting is QEMU's
//! (`VIRTIO_BALLOON_FREE_PAGE_HINT_CMD_ID_MIN`). QEMU reserves the ids below it for future
//! commands.

/// The command id of one hint round, as the device issues it: `0x8000_0000 ..= u32::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HintId(u32);

impl HintId {
    /// The lowest id.
    pub const FIRST: Self = Self(0x8000_0000);
    /// The highest id. Its successor is [`FIRST`](Self::FIRST).
    pub const LAST: Self = Self(u32::MAX);

    /// Returns the id with this number, or `None` if the number is out of range.
    pub const fn new(number: u32) -> Option<Self> {
        if number >= Self::FIRST.0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Returns the number, as in configuration space and on the free page queue.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Returns the next id. Wraps within the range, so the result is never STOP, DONE or a reserved
    /// id.
    #[must_use]
    pub const fn successor(self) -> Self {
        // Every id has the top bit set. The bitwise OR restores it after a wrap to 0.
        Self(self.0.wrapping_add(1) | Self::FIRST.0)
    }

    /// Returns the number of [`successor`](Self::successor) steps from `earlier` to `self`:
    /// `0 ..= 0x7fff_ffff`.
    pub const fn steps_since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0) & (Self::FIRST.0 - 1)
    }
}

/// The command id of one hint round, as the driver accepts it: `2 ..= u32::MAX`, everything except
/// STOP and DONE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HintRoundId(u32);

impl HintRoundId {
    /// Returns the number, as in configuration space and on the free page queue.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl From<HintId> for HintRoundId {
    fn from(id: HintId) -> Self {
        Self(id.number())
    }
}

/// The meaning of a command id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CommandId {
    /// 0: the device does not want hints now. The driver keeps the hinted blocks.
    Stop,
    /// 1: the device no longer needs the hinted blocks. The driver returns them to the guest.
    Done,
    /// Below `0x8000_0000`, and neither STOP nor DONE. Devices of this project do not issue it.
    Reserved(u32),
    /// The id of a hint round.
    Hint(HintId),
}

impl CommandId {
    /// Returns the meaning of a number. Every number has one.
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

    /// Returns the hint round that the id requests from a driver; `None` for STOP and DONE.
    pub const fn hint_round(self) -> Option<HintRoundId> {
        match self.number() {
            0 | 1 => None,
            number => Some(HintRoundId(number)),
        }
    }

    /// Returns the number, as in configuration space and on the free page queue.
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

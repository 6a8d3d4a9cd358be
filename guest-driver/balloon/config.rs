// SPDX-License-Identifier: GPL-2.0

//! The balloon's config space.

use kernel::page::PAGE_SHIFT;
use kernel::prelude::*;

use crate::shared_abi::command::CommandId;
use crate::shared_abi::features::Features;
use crate::shared_abi::{config, page};
use crate::virtio::{Config, Field};

const NUM_PAGES: Field<u32> = Field::new::<{ config::NUM_PAGES }, { config::MAX_SIZE }>();
const ACTUAL: Field<u32> = Field::new::<{ config::ACTUAL }, { config::MAX_SIZE }>();
const FREE_PAGE_HINT_CMD_ID: Field<u32> =
    Field::new::<{ config::FREE_PAGE_HINT_CMD_ID }, { config::MAX_SIZE }>()
        .with_feature(Features::FREE_PAGE_HINT.bit_number());
const POISON_VAL: Field<u32> = Field::new::<{ config::POISON_VAL }, { config::MAX_SIZE }>()
    .with_feature(Features::PAGE_POISON.bit_number());

/// The config space of one balloon.
///
/// Its methods may sleep. They fail with `ENODEV` after the device is unbound or shut down, and
/// with `EINVAL` for a field whose feature is not negotiated.
#[derive(Clone)]
pub(crate) struct BalloonConfig(Config);

impl BalloonConfig {
    /// Returns the size of config space with `features`, in bytes.
    pub(crate) fn size(features: Features) -> usize {
        config::size_for(features)
    }

    /// Wraps `config`.
    pub(crate) fn new(config: Config) -> Self {
        Self(config)
    }

    /// Returns the host's target (`num_pages`), in pages of 4 KiB, rounded up to whole guest pages.
    pub(crate) fn target(&self) -> Result<u64> {
        let pages = self.0.read(NUM_PAGES)?;
        let whole = page::round_up_to_guest_pages(pages, PAGE_SHIFT as u32);
        Ok(u64::from(whole.unwrap_or(pages)))
    }

    /// Writes the size of the balloon (`actual`), in pages of 4 KiB. Larger sizes than `u32::MAX`
    /// are clamped.
    pub(crate) fn set_actual(&self, pages: u64) -> Result {
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        self.0.write(ACTUAL, pages)
    }

    /// Returns the command id of free page hinting. Requires `FREE_PAGE_HINT`.
    pub(crate) fn free_page_hint_cmd_id(&self) -> Result<CommandId> {
        let number = self.0.read(FREE_PAGE_HINT_CMD_ID)?;
        Ok(CommandId::from_number(number))
    }

    /// Writes the pattern that fills the guest's free pages (`poison_val`). Requires `PAGE_POISON`.
    pub(crate) fn set_poison_val(&self, pattern: u32) -> Result {
        self.0.write(POISON_VAL, pattern)
    }
}

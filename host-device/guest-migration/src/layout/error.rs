// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of layouts.

use thiserror::Error;

use crate::PAGE_SIZE;

/// Maximum length of the name of a RAM block, in bytes.
pub const RAM_BLOCK_NAME_MAX: usize = 255;

/// Why RAM blocks and regions do not form a valid layout.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum LayoutError {
    /// A start or a length is not a multiple of [`PAGE_SIZE`].
    #[error("region {start:#x}+{length:#x} is not aligned to pages of {PAGE_SIZE} bytes")]
    Unaligned {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A region holds no page.
    #[error("region at {start:#x} is empty")]
    Empty {
        /// Guest physical address.
        start: u64,
    },
    /// A region extends beyond the end of the address space.
    #[error("region {start:#x}+{length:#x} exceeds the address space")]
    Wraps {
        /// Guest physical address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Two regions share a guest physical address.
    #[error("regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest physical address of the lower region.
        first: u64,
        /// Guest physical address of the higher region.
        second: u64,
    },
    /// A region maps bytes that its RAM block does not have, or its RAM block does not exist, or its offset is not a
    /// multiple of [`PAGE_SIZE`].
    #[error("region at {start:#x} exceeds RAM block {block} at offset {offset:#x}, or the RAM block does not exist")]
    OutsideRamBlock {
        /// Guest physical address.
        start: u64,
        /// Index of the RAM block.
        block: usize,
        /// Offset in the RAM block, in bytes.
        offset: u64,
    },
    /// The name of a RAM block is empty or too long, or its length is 0 or not a multiple of [`PAGE_SIZE`].
    #[error("RAM block '{name}' of {length:#x} bytes is invalid: the name must have 1 to {RAM_BLOCK_NAME_MAX} bytes, and the length must be a multiple of {PAGE_SIZE}")]
    RamBlock {
        /// Name of the RAM block.
        name: String,
        /// Length of the RAM block in bytes.
        length: u64,
    },
    /// Two RAM blocks have the same name.
    #[error("RAM block name '{0}' is not unique")]
    DuplicateName(String),
    /// The dirty bitmap of a RAM block does not fit in memory.
    #[error("not enough memory for the dirty bitmap of RAM block '{name}' of {length:#x} bytes")]
    TooLarge {
        /// Name of the RAM block.
        name: String,
        /// Length of the RAM block in bytes.
        length: u64,
    },
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A RAM block: a memory file of the guest.

use super::error::{LayoutError, RAM_BLOCK_NAME_MAX};
use crate::PAGE_SIZE;

/// A memory file of the guest. It has a name and at least one page, and consists of whole pages.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RamBlock {
    pub(super) name: Box<str>,
    pages: u64,
}

impl RamBlock {
    /// Returns the RAM block `name` of `length` bytes.
    ///
    /// # Errors
    ///
    /// If the name is empty or longer than [`RAM_BLOCK_NAME_MAX`], or the length is 0 or not a multiple of
    /// [`PAGE_SIZE`].
    pub fn new(name: &str, length: u64) -> Result<Self, LayoutError> {
        if name.is_empty()
            || name.len() > RAM_BLOCK_NAME_MAX
            || length == 0
            || length % PAGE_SIZE != 0
        {
            return Err(LayoutError::RamBlock {
                name: name.chars().take(RAM_BLOCK_NAME_MAX).collect(),
                length,
            });
        }
        Ok(Self {
            name: name.into(),
            pages: length / PAGE_SIZE,
        })
    }

    /// Returns the name, which is the same at source and destination.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the number of pages.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the number of bytes.
    pub const fn length(&self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

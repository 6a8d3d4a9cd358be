// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A mapping of a part of a memory file.

use std::fs::File;

use anyhow::{ensure, Context, Result};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

pub const PAGE: u64 = guest_migration::PAGE_SIZE;

/// A shared mapping of pages of a file.
pub struct PageMapping {
    first: u64,
    pages: u64,
    memory: GuestMemoryMmap,
}

impl PageMapping {
    /// Maps `pages` pages of `file`, from page `first`.
    pub fn map(file: &File, first: u64, pages: u64) -> Result<Self> {
        let file = file.try_clone().context("cannot share the file")?;
        let length = usize::try_from(pages * PAGE)?;
        let range = (
            GuestAddress(0),
            length,
            Some(FileOffset::new(file, first * PAGE)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).context("cannot map")?;
        Ok(Self {
            first,
            pages,
            memory,
        })
    }

    fn address(&self, page: u64) -> Result<GuestAddress> {
        ensure!(
            (self.first..self.first + self.pages).contains(&page),
            "page {page} is not in the window"
        );
        Ok(GuestAddress((page - self.first) * PAGE))
    }

    /// Writes the first byte of a page of the file.
    pub fn write(&self, page: u64, value: u8) -> Result<()> {
        let address = self.address(page)?;
        self.memory
            .write_obj(value, address)
            .context("cannot write")
    }

    /// Reads the first byte of a page of the file.
    pub fn read(&self, page: u64) -> Result<u8> {
        let address = self.address(page)?;
        self.memory.read_obj(address).context("cannot read")
    }
}

/// A pseudo-random sequence. The same seed gives the same sequence.
pub struct Rng(pub u64);

impl Rng {
    /// Returns a number less than `below`.
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory and a process without writers, for tests.

use super::Quiesce;

/// A [`Quiesce`] for a process that never writes to guest memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NoWriters;

impl Quiesce for NoWriters {
    fn with_quiesced(&self, action: &mut dyn FnMut()) {
        action();
    }
}

/// Returns memory with one RAM block for each element of `pages`, which is its number of pages. A region maps the first
/// RAM block at address 0.
pub(super) fn test_memory(pages: &[u64]) -> crate::Memory {
    use crate::{Layout, Memory, RamBlock, Region, PAGE_SIZE};
    use rustix::fs::{ftruncate, memfd_create, MemfdFlags};

    let lengths = pages.iter().map(|pages| pages * PAGE_SIZE);
    let names = ('a'..='z').map(String::from);
    let blocks = lengths
        .clone()
        .zip(names)
        .map(|(length, name)| RamBlock::new(&name, length).unwrap());
    let region = Region::new(0, pages[0] * PAGE_SIZE).unwrap();
    let layout = Layout::new(blocks, [region]).unwrap();
    let files = lengths.map(|length| {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, length).unwrap();
        file.into()
    });
    Memory::new(layout.into(), files.collect()).unwrap()
}

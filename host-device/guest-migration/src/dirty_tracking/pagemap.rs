// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Soft-dirty bits: read from `/proc/PID/pagemap`, cleared through `/proc/PID/clear_refs`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::processes::{none_if_exited, Mapping};
use crate::{PageRun, PAGE_SIZE};

/// Size of an entry of `pagemap`, in bytes.
const ENTRY_SIZE: usize = 8;
/// The bit of an entry that is set if the page was written since the bits were cleared.
const SOFT_DIRTY: u64 = 1 << 55;
/// The value that clears the soft-dirty bits when it is written to `clear_refs`.
const CLEAR_SOFT_DIRTY: &str = "4";
/// Maximum number of entries per read.
const ENTRIES_AT_ONCE: u64 = 1 << 16;

/// The soft-dirty bits of a process.
pub(super) struct PageMap(File);

impl PageMap {
    /// Opens the bits of a process. Returns `None` if the process has exited.
    pub(super) fn open(pid: u32) -> io::Result<Option<Self>> {
        let file = none_if_exited(File::open(format!("/proc/{pid}/pagemap")))?;
        Ok(file.map(Self))
    }

    /// Calls `dirty` with each run of pages that were written through `mapping`, as pages of its RAM block. Returns the
    /// number of these pages. If the process exits meanwhile, the pages whose bits cannot be read count as written.
    pub(super) fn dirty(
        &self,
        mapping: &Mapping,
        mut dirty: impl FnMut(PageRun),
    ) -> io::Result<u64> {
        let mut buffer = Vec::new();
        let (mut done, mut count) = (0, 0);
        while done < mapping.pages() {
            let most = ENTRIES_AT_ONCE.min(mapping.pages() - done);
            let length = usize::try_from(most).unwrap_or(usize::MAX) * ENTRY_SIZE;
            buffer.resize(length, 0);
            let offset = (mapping.start / PAGE_SIZE + done) * ENTRY_SIZE as u64;
            let got = none_if_exited(self.0.read_at(&mut buffer, offset))?.unwrap_or(0);
            let run = |first: u64, pages: u64| PageRun {
                block: mapping.block,
                first: mapping.first.saturating_add(first),
                pages,
            };
            let entries = buffer
                .get(..got)
                .unwrap_or_default()
                .chunks_exact(ENTRY_SIZE);
            if entries.len() == 0 {
                let rest = mapping.pages() - done;
                dirty(run(done, rest));
                return Ok(count + rest);
            }
            let mut from = None;
            let read = entries.len() as u64;
            for (page, entry) in (done..).zip(entries) {
                let entry = entry.try_into().map_or(SOFT_DIRTY, u64::from_ne_bytes);
                match (entry & SOFT_DIRTY != 0, from) {
                    (true, None) => from = Some(page),
                    (false, Some(first)) => {
                        dirty(run(first, page - first));
                        count += page - first;
                        from = None;
                    }
                    _ => {}
                }
            }
            done += read;
            if let Some(first) = from {
                dirty(run(first, done - first));
                count += done - first;
            }
        }
        Ok(count)
    }
}

/// Clears the soft-dirty bits of a process. Does nothing if the process has exited.
pub(super) fn clear(pid: u32) -> io::Result<()> {
    none_if_exited(fs::write(
        format!("/proc/{pid}/clear_refs"),
        CLEAR_SOFT_DIRTY,
    ))
    .map(drop)
}

/// Checks that we may clear the soft-dirty bits of a process.
pub(super) fn can_clear(pid: u32) -> io::Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    none_if_exited(OpenOptions::new().write(true).open(path)).map(drop)
}

/// Checks that the kernel records writes in soft-dirty bits. Clears the bits of our own process. An error states why
/// the bits are unusable.
pub(super) fn check_support() -> Result<(), String> {
    const PAGES: usize = 4;
    let size = rustix::param::page_size();
    if u64::try_from(size) != Ok(PAGE_SIZE) {
        return Err(format!("system page size of {size} bytes is not supported"));
    }
    let failed = |what, error| format!("{what} of this process: {error}");
    let own = std::process::id();
    // The buffer contains at least one page that holds no other data.
    let memory: Vec<AtomicU8> = (0..PAGES * size).map(|_| AtomicU8::new(1)).collect();
    let start = memory.as_ptr() as usize;
    let skip = start.next_multiple_of(size) - start;
    let byte = memory.get(skip).ok_or("test page is outside its buffer")?;
    let page = Mapping {
        start: (start + skip) as u64,
        end: (start + skip + size) as u64,
        block: 0,
        first: 0,
        writable: true,
    };
    let map = PageMap::open(own).map_err(|error| failed("/proc/PID/pagemap", error))?;
    let map = map.ok_or("/proc/PID/pagemap does not exist")?;
    let count_dirty = || map.dirty(&page, |_| ());
    let read = |error| failed("/proc/PID/pagemap", error);
    clear(own).map_err(|error| failed("/proc/PID/clear_refs", error))?;
    let clean = count_dirty().map_err(read)?;
    byte.store(2, Ordering::SeqCst);
    let written = count_dirty().map_err(read)?;
    match (clean, written) {
        (0, 1) => Ok(()),
        (0, _) => Err("kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY is off)".into()),
        _ => Err("kernel does not clear soft-dirty bits".into()),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports of the debug kernel: locks, page owners and leaks.

use std::ops::Range;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{ReadFile, WriteFile};

use crate::check::bug_reports;
use crate::guest::Guest;

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
/// The age that objects must have before a scan. kmemleak ignores objects younger than five seconds.
const LEAK_AGE: Duration = Duration::from_millis(5_200);

/// Functions of user-mode Linux whose allocations, for its consoles and serial lines, kmemleak reports as leaks: their
/// pointers are in memory that kmemleak does not scan.
const KNOWN_UNREFERENCED: [&str; 3] = [" ssl_init+", " line_write+", " line_interrupt+"];

/// Kernel arguments that make the kernel track the owner of each page and of each object. They make the kernel slow.
///
/// One processor: with kmemleak, user-mode Linux violates an RCU rule when it starts a second one.
pub const OWNER_TRACKING: &str = "ncpus=1 page_owner=on kmemleak=on";

/// The pages in use that were allocated with the same stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageOwner {
    /// The number of pages.
    pub pages: u64,
    /// The stack, innermost frame first.
    pub stack: Vec<String>,
}

impl Guest {
    /// Checks that the debug kernel has reported nothing since its log was last read, and that lockdep is still active.
    ///
    /// # Errors
    ///
    /// Fails with the reports.
    pub fn check_debug_kernel(&mut self) -> Result<()> {
        let log = self.kernel_log()?;
        let bug_reports = bug_reports(&log);
        ensure!(
            bug_reports.is_empty(),
            "the kernel reports: {bug_reports:#?}"
        );
        let locks = self.call(ReadFile {
            path: "/proc/lockdep_stats".to_owned(),
        })?;
        let watches = |line: &str| line.split_whitespace().eq(["debug_locks:", "1"]);
        ensure!(
            locks.lines().any(watches),
            "the kernel does not watch locks any more: {locks}"
        );
        Ok(())
    }

    /// Returns the pages in use that a module has allocated, directly or through other functions. `name` is the
    /// module's name, and `code` is its address range. The module may be unloaded.
    ///
    /// Pages of slab objects are left out, because other code shares them. Needs `page_owner=on` on the kernel's
    /// command line.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not track page owners.
    pub fn pages_owned(&mut self, name: &str, code: &Range<u64>) -> Result<Vec<PageOwner>> {
        let path = "/sys/kernel/debug/page_owner_stacks/show_stacks".to_owned();
        let text = self.call(ReadFile { path })?;
        let mut owners = parse_owners(&text).context("strange list of page owners")?;
        ensure!(!owners.is_empty(), "the kernel knows of no page's owner");
        owners.retain(|owner| owner.is_of_module(name, code));
        Ok(owners)
    }

    /// Waits until all objects are old enough, and returns kmemleak's reports. Objects of the functions `ssl_init`,
    /// `line_write` and `line_interrupt` are left out. Needs `kmemleak=on` on the kernel's command line.
    ///
    /// # Errors
    ///
    /// Fails if the kernel has no kmemleak.
    pub fn leaks(&mut self) -> Result<Vec<String>> {
        sleep(LEAK_AGE);
        // A scan does not report an object that has changed since the scan before.
        for _ in 0..2 {
            self.call(WriteFile {
                path: KMEMLEAK.to_owned(),
                text: "scan".to_owned(),
            })?;
        }
        let text = self.call(ReadFile {
            path: KMEMLEAK.to_owned(),
        })?;
        Ok(unreferenced_objects(&text))
    }
}

/// Splits kmemleak's output into one text for each object.
fn unreferenced_objects(text: &str) -> Vec<String> {
    const EACH: &str = "unreferenced object";
    let objects = text.split(EACH).skip(1);
    objects
        .filter(|object| {
            !KNOWN_UNREFERENCED
                .iter()
                .any(|function| object.contains(function))
        })
        .map(|object| format!("{EACH}{object}"))
        .collect()
}

/// Parses blocks that consist of a stack, one frame a line, and the number of pages. An empty line ends a block.
fn parse_owners(text: &str) -> Option<Vec<PageOwner>> {
    let blocks = text.split("\n\n").filter(|block| !block.trim().is_empty());
    blocks
        .map(|block| {
            let (stack, pages) = block.trim_end().rsplit_once('\n')?;
            let pages = pages.trim().strip_prefix("nr_base_pages: ")?.parse().ok()?;
            let stack = stack.lines().map(|line| line.trim().to_owned()).collect();
            Some(PageOwner { pages, stack })
        })
        .collect()
}

impl PageOwner {
    fn is_of_module(&self, name: &str, code: &Range<u64>) -> bool {
        let for_slab = |frame: &String| frame.starts_with("new_slab+");
        !self.stack.iter().any(for_slab)
            && self.stack.iter().any(|frame| of_module(frame, name, code))
    }
}

/// Returns whether a stack frame is in the module. A frame is `symbol+0x1/0x2 [name]`, or only an address if the module
/// is unloaded.
fn of_module(frame: &str, name: &str, code: &Range<u64>) -> bool {
    let address = frame
        .strip_prefix("0x")
        .and_then(|digits| u64::from_str_radix(digits, 16).ok());
    frame.contains(&format!("[{name}]")) || address.is_some_and(|at| code.contains(&at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STACKS: &str = " get_page+0x1/0x2
 probe+0x10/0x20 [virtio_balloon_rs]
 really_probe+0x5/0x6
nr_base_pages: 12

 get_page+0x1/0x2
 0x60a01234
nr_base_pages: 1

 get_page+0x1/0x2
 0x70a01234
nr_base_pages: 3

 new_slab+0x1/0x2
 probe+0x10/0x20 [virtio_balloon_rs]
nr_base_pages: 4
";

    #[test]
    fn only_serial_lines_may_seem_lost() {
        let text = "unreferenced object 0x1 (size 8):
  backtrace (crc 1):
    kstrdup+0x1/0x2
    ssl_init+0x1/0x2
unreferenced object 0x2 (size 8):
  backtrace (crc 1):
    probe+0x1/0x2 [virtio_balloon_rs]
";
        let unreferenced_objects = unreferenced_objects(text);
        assert_eq!(unreferenced_objects.len(), 1);
        assert!(unreferenced_objects[0].starts_with("unreferenced object 0x2"));
    }

    #[test]
    fn a_modules_pages_are_found_while_it_is_loaded_and_afterwards() {
        let mut owners = parse_owners(STACKS).unwrap();
        assert_eq!(owners.len(), 4);
        owners.retain(|owner| owner.is_of_module("virtio_balloon_rs", &(0x60a0_0000..0x60a1_0000)));
        let pages: Vec<_> = owners.iter().map(|owner| owner.pages).collect();
        assert_eq!(pages, [12, 1]);
        assert_eq!(parse_owners("nonsense\n\n"), None);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Parser for `/proc/PID/maps`.

use super::file_id::FileId;
use crate::PAGE_SIZE;

/// A shared mapping of a part of a RAM block in a process. It consists of whole pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Mapping {
    /// The first address.
    pub(crate) start: u64,
    /// The address after the last.
    pub(crate) end: u64,
    /// Index of the RAM block.
    pub(crate) block: usize,
    /// The page of the RAM block that is mapped at `start`.
    pub(crate) first: u64,
    /// Whether the process may write through the mapping now.
    pub(crate) writable: bool,
}

impl Mapping {
    /// Returns the number of pages.
    pub(crate) fn pages(&self) -> u64 {
        (self.end - self.start) / PAGE_SIZE
    }
}

/// Returns the shared mappings of memory files in the text of a `maps` file. `block` returns the RAM block index of a
/// memory file. Skips all other lines.
pub(super) fn parse<'a>(
    text: &'a [u8],
    block: impl Fn(FileId) -> Option<usize> + 'a,
) -> impl Iterator<Item = Mapping> + 'a {
    text.split(|byte| *byte == b'\n')
        .filter_map(move |line| mapping(line, &block))
}

/// Parses a line such as `55d0-55d2 rw-s 00001000 00:01 1234      /memfd:ram (deleted)`.
fn mapping(line: &[u8], block: &impl Fn(FileId) -> Option<usize>) -> Option<Mapping> {
    // Only the path, the last field, may contain characters that are not ASCII. It may contain any characters.
    let mut words = line
        .split(|byte| *byte == b' ')
        .map(|word| std::str::from_utf8(word).unwrap_or_default());
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?.as_bytes();
    let offset = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode = words.next()?.parse().ok()?;
    if rights.get(3) != Some(&b's') {
        return None;
    }
    let hexadecimal = |digits| u64::from_str_radix(digits, 16).ok();
    let block = block(FileId {
        major: u32::from_str_radix(major, 16).ok()?,
        minor: u32::from_str_radix(minor, 16).ok()?,
        inode,
    })?;
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    (start < end).then_some(Mapping {
        start,
        end,
        block,
        first: hexadecimal(offset)? / PAGE_SIZE,
        writable: rights.get(1) == Some(&b'w'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"\
55d000000000-55d000001000 r-xp 00000000 fe:01 77                         /usr/bin/qemu\n\
7f0000000000-7f0000004000 rw-s 00002000 00:01 1234                       /memfd:a-b 00:01 (deleted)\n\
7f0000004000-7f0000005000 r--s 00000000 00:01 1234                       /memfd:\xff (deleted)\n\
7f0000005000-7f0000006000 rw-p 00000000 00:01 1234                       /memfd:ram (deleted)\n\
7f0000006000-7f0000007000 rw-s 00000000 01:00 1234                       /dev/shm/other\n\
7f0000008000-7f0000009000 rw-p 00000000 00:00 0 \n\
7f000000a000-7f000000b000 -w-s 00001000 00:01 0000000001235\n\
not a line\n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";

    #[test]
    fn shared_mappings_of_the_memory_files_are_found_by_device_and_inode() {
        let inodes = [1234, 1235];
        let block = |id: FileId| {
            let at = inodes.iter().position(|inode| *inode == id.inode);
            at.filter(|_| (id.major, id.minor) == (0, 1))
        };
        let found: Vec<_> = parse(TEXT, block)
            .map(|it| {
                (
                    it.start & 0xffff,
                    it.pages(),
                    it.block,
                    it.first,
                    it.writable,
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                (0x0000, 4, 0, 2, true),
                (0x4000, 1, 0, 0, false),
                (0xa000, 1, 1, 1, true)
            ]
        );
    }
}

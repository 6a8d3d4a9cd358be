// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel log, read record by record from `/dev/kmsg`.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{KernelLogRecord, WaitKernelLog};
use nix::fcntl::OFlag;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::serve::HandleCall;

/// A reader of the kernel log with its own position. A new reader starts at the oldest record.
pub struct KmsgReader(File);

impl KmsgReader {
    /// Opens the log.
    pub fn open() -> Result<Self> {
        let options = || {
            OpenOptions::new()
                .read(true)
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open("/dev/kmsg")
        };
        options().map(Self).context("cannot open /dev/kmsg")
    }

    /// Returns the next record, or `None` if there is none yet. Records that the kernel overwrote before they were read
    /// are skipped.
    fn next(&mut self) -> Result<Option<KernelLogRecord>> {
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(length) => {
                    let record = String::from_utf8_lossy(record.get(..length).unwrap_or_default())
                        .into_owned();
                    return parse(&record)
                        .map(Some)
                        .with_context(|| format!("strange log record {record:?}"));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::BrokenPipe) => {}
                Err(error) => return Err(error).context("cannot read /dev/kmsg"),
            }
        }
    }

    /// Returns all records that are not read yet.
    pub fn rest(&mut self) -> Result<Vec<KernelLogRecord>> {
        std::iter::from_fn(|| self.next().transpose()).collect()
    }

    fn wait(&self, timeout: Duration) -> Result<()> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        poll(
            &mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)],
            timeout,
        )
        .context("cannot wait for the kernel log")?;
        Ok(())
    }
}

/// Parses a record: `level,sequence,microseconds,flags;text`, then indented lines that describe the device.
fn parse(record: &str) -> Option<KernelLogRecord> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let level = fields.next()?.parse::<u32>().ok()? & 7;
    Some(KernelLogRecord {
        level: u8::try_from(level).ok()?,
        sequence: fields.next()?.parse().ok()?,
        time_us: fields.next()?.parse().ok()?,
        text: text.lines().next().unwrap_or_default().to_owned(),
    })
}

impl HandleCall for WaitKernelLog {
    fn handle(self) -> Result<KernelLogRecord> {
        let deadline = Instant::now() + Duration::from_millis(self.timeout_ms);
        let mut log = KmsgReader::open()?;
        loop {
            while let Some(line) = log.next()? {
                if line.sequence >= self.from && line.text.contains(&self.substring) {
                    return Ok(line);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the kernel log had no line with {:?} within {} ms",
                    self.substring,
                    self.timeout_ms
                );
            }
            log.wait(left)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_taken_apart() {
        let line =
            parse("6,339,5140900,-;virtio_balloon virtio2: hello; world\n SUBSYSTEM=virtio\n")
                .unwrap();
        assert_eq!(
            (line.level, line.sequence, line.time_us),
            (6, 339, 5_140_900)
        );
        assert_eq!(line.text, "virtio_balloon virtio2: hello; world");
        assert_eq!(parse("no record"), None);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The far end of a migration: `balloonctl receive`, and the memory file that it writes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};
use tempfile::TempDir;

use crate::host::memory_folder;
use crate::memory_image::MemoryImage;
use crate::process::{Process, Streams};
use crate::HANG_TIMEOUT;

/// A receiver, and a folder in memory for what it receives. Both go with this value.
#[derive(Debug)]
pub struct Destination {
    // Before the folder.
    process: Process,
    folder: TempDir,
}

impl Destination {
    /// Starts `balloonctl receive`, and waits until it listens. `memory` is the size of the guest that is to come.
    ///
    /// # Errors
    ///
    /// If it does not listen in time; the error holds what it said.
    pub fn start(balloonctl: &Path, memory: u64) -> Result<Self> {
        Self::start_with_ram_blocks(balloonctl, memory, 1)
    }

    /// As [`Destination::start`], of a guest whose memory lies in so many files.
    ///
    /// # Errors
    ///
    /// As [`Destination::start`].
    pub fn start_with_ram_blocks(
        balloonctl: &Path,
        memory: u64,
        ram_blocks: usize,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("vballoon-there-")
            .tempdir_in(memory_folder(memory))
            .context("cannot make a folder for a destination")?;
        let mut command = Command::new(balloonctl);
        command
            .arg("receive")
            .arg("--listen")
            .arg(uri(&folder.path().join(SOCKET)));
        let file = folder.path().join(MEMORY);
        if ram_blocks == 1 {
            command.arg("--memory-file").arg(file);
        } else {
            for ram_block in 0..ram_blocks {
                let named = format!("ram{ram_block}={}-{ram_block}", file.display());
                command.args(["--memory-file", &named]);
            }
        }
        let mut process = Process::start("balloonctl receive", command, Streams::Collected)?;
        // Not when the socket is there: it is before anybody listens.
        let listens = |line: &str| line.starts_with("listening at");
        if let Err(error) = process
            .output()
            .wait_for("listening", listens, HANG_TIMEOUT)
        {
            return Err(error.context(process.diagnostics()));
        }
        Ok(Self { process, folder })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(SOCKET)
    }

    /// Where it listens, as `migrate` wants it.
    #[must_use]
    pub fn uri(&self) -> String {
        uri(&self.socket())
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until it has received all.
    ///
    /// # Errors
    ///
    /// If it has not, or leaves its mark though it has; the error holds what it said.
    pub fn wait(&mut self) -> Result<()> {
        let status = self.process.wait(HANG_TIMEOUT)?;
        ensure!(
            status.success(),
            "the receiver failed\n{}",
            self.process.diagnostics()
        );
        ensure!(!self.is_incomplete(), "a whole memory is marked incomplete");
        Ok(())
    }

    /// Waits until it has given up, and returns what it said.
    ///
    /// # Errors
    ///
    /// If it has not, or if what it has written does not bear its mark.
    pub fn wait_failure(&mut self) -> Result<String> {
        let status = self.process.wait(HANG_TIMEOUT)?;
        let text = self.process.output().text();
        ensure!(!status.success(), "the receiver is content: {text}");
        ensure!(
            self.is_incomplete() || !self.memory_file().exists(),
            "a part of a memory is not marked incomplete: {text}"
        );
        Ok(text)
    }

    /// The memory file.
    #[must_use]
    pub fn memory_file(&self) -> PathBuf {
        self.folder.path().join(MEMORY)
    }

    /// Whether the memory file is marked as incomplete.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.folder
            .path()
            .join(format!("{MEMORY}.incomplete"))
            .exists()
    }

    /// What is in the memory file.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn memory_image(&self) -> Result<MemoryImage> {
        MemoryImage::open(&self.memory_file())
    }
}

const SOCKET: &str = "ram.sock";
const MEMORY: &str = "ram";

/// A socket as `migrate` and `receive` want it.
#[must_use]
pub fn uri(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

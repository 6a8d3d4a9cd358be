// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The destination of a migration: `balloonctl receive`, and the memory file that it writes.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};
use tempfile::TempDir;

use crate::host::memory_folder;
use crate::memory_image::MemoryImage;
use crate::process::{Process, Streams};
use crate::HANG_TIMEOUT;

/// A receiver, and the folder with the memory that it has received. Both are removed on drop.
#[derive(Debug)]
pub struct Destination {
    // Dropped before the folder.
    process: Process,
    folder: TempDir,
}

impl Destination {
    /// Starts `balloonctl receive` and waits until it listens. `memory` is the size of the expected guest, in bytes.
    ///
    /// # Errors
    ///
    /// Fails if the receiver does not listen within [`HANG_TIMEOUT`]. The error contains its output.
    pub fn start(balloonctl: &Path, memory: u64) -> Result<Self> {
        Self::start_with_ram_blocks(balloonctl, memory, 1)
    }

    /// Does the same as [`Destination::start`], for a guest with `ram_blocks` RAM blocks.
    ///
    /// # Errors
    ///
    /// Same as [`Destination::start`].
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
        // The existence of the socket is not enough: the socket exists before the receiver listens.
        let listens = |line: &str| line.starts_with("listening on");
        if let Err(error) = process
            .output()
            .wait_for("listening", listens, HANG_TIMEOUT)
        {
            return Err(error.context(process.diagnostics()));
        }
        Ok(Self { process, folder })
    }

    /// Returns the path of the receiver's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(SOCKET)
    }

    /// Returns the receiver's address, in the form that `migrate` takes.
    #[must_use]
    pub fn uri(&self) -> String {
        uri(&self.socket())
    }

    /// Returns the receiver's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until the receiver has received all memory.
    ///
    /// # Errors
    ///
    /// Fails if the receiver fails, or leaves the memory file marked as incomplete. The error contains the receiver's
    /// output.
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

    /// Waits until the receiver has failed, and returns its output.
    ///
    /// # Errors
    ///
    /// Fails if the receiver succeeds, or if a memory file exists that is not marked as incomplete.
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

    /// Returns the path of the memory file.
    #[must_use]
    pub fn memory_file(&self) -> PathBuf {
        self.folder.path().join(MEMORY)
    }

    /// Returns whether the memory file is marked as incomplete.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.folder
            .path()
            .join(format!("{MEMORY}.incomplete"))
            .exists()
    }

    /// Opens the memory file.
    ///
    /// # Errors
    ///
    /// Fails if there is no memory file.
    pub fn memory_image(&self) -> Result<MemoryImage> {
        MemoryImage::open(&self.memory_file())
    }
}

const SOCKET: &str = "ram.sock";
const MEMORY: &str = "ram";

/// Returns the address of a socket, in the form that `migrate` and `receive` take.
#[must_use]
pub fn uri(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of the memory files of a destination.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a stream cannot be received into the memory files.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages describe the variants.
pub enum DestinationError {
    #[error("no memory file was given: give one for each RAM block of the stream")]
    NoFile,
    #[error("RAM block '{0}' has two memory files: give one")]
    DuplicateFile(String),
    #[error("RAM block '{block}' of the stream has no memory file (given: {given})")]
    NoFileForBlock { block: String, given: String },
    #[error("stream has {blocks} RAM blocks ({names}), but only one memory file was given: give each as NAME=PATH")]
    NeedNames { blocks: usize, names: String },
    #[error("memory file was given for RAM block '{0}', which is not in the stream")]
    UnusedFile(String),
    #[error("{} has {has} bytes, but RAM block '{block}' of the stream has {wanted}: give a file of that size, or a path that does not exist", path.display())]
    SizeMismatch {
        path: PathBuf,
        block: String,
        has: u64,
        wanted: u64,
    },
    #[error("{} is not a regular file: memory is received into regular files only", .0.display())]
    NotRegularFile(PathBuf),
    #[error("{} is in use by another receiver", .0.display())]
    Busy(PathBuf),
    #[error("memory files could not be compared with the sender's digest")]
    DigestFailed,
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
}

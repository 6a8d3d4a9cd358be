// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors of the memory files of a destination.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a stream cannot be received into the memory files.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The messages describe the variants.
pub enum DestinationError {
    #[error("no memory file was given")]
    NoFile,
    #[error("two memory files were given for block '{0}'")]
    DuplicateFile(String),
    #[error("the stream has block '{block}', for which no memory file was given (given: {given})")]
    NoFileForBlock { block: String, given: String },
    #[error("the stream has {blocks} blocks ({names}), and only one memory file was given: give each as NAME=PATH")]
    NeedNames { blocks: usize, names: String },
    #[error("a memory file was given for block '{0}', which the stream has not")]
    UnusedFile(String),
    #[error("{} has {has} bytes, block '{block}' of the stream {wanted}: give a file of that size, or none that exists", path.display())]
    SizeMismatch {
        path: PathBuf,
        block: String,
        has: u64,
        wanted: u64,
    },
    #[error("{} is not a regular file: memory is received into files only", .0.display())]
    NotRegularFile(PathBuf),
    #[error("another receiver is at work on {}", .0.display())]
    Busy(PathBuf),
    #[error("the memory files could not be compared with the sender's memory")]
    DigestFailed,
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
}

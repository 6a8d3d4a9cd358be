// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Listening Unix sockets in the file system. A listener does not replace the socket of a running process, and removes
//! its own when it is dropped.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;
use tracing::{info, warn};

/// Why a socket cannot be bound.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another process listens at the path.
    #[error("{path} is in use by a running process: stop that process, or choose another path")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The path exists and is not a socket. It is not changed.
    #[error("{path} exists and is not a socket: remove it, or choose another path")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The host reported an error.
    #[error("cannot listen on {path}: {source}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// The error of the host.
        source: io::Error,
    },
}

/// A listening socket at a path. Dropping it removes the path.
#[derive(Debug)]
pub struct SocketListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file. Another process may have replaced the file since.
    file: Option<(u64, u64)>,
}

impl SocketListener {
    /// Listens at `path`. Replaces a socket that an ended process has left there.
    ///
    /// # Errors
    ///
    /// If a process listens there, if the path is not a socket, or if the host reports an error.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let bind = |source| SocketError::Bind {
            path: path.into(),
            source,
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path).map_err(bind)?
            }
            other => other.map_err(bind)?,
        };
        listener.set_nonblocking(true).map_err(bind)?;
        Ok(Self {
            listener,
            path: path.into(),
            file: identity(path),
        })
    }

    /// Returns the path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the next pending connection, if there is one.
    pub fn accept(&self) -> Option<UnixStream> {
        match self.listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => {
                warn!("{}: accept failed: {error}", self.path.display());
                None
            }
        }
    }
}

impl AsFd for SocketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketListener {
    fn drop(&mut self) {
        if self.file.is_some() && self.file == identity(&self.path) {
            if let Err(error) = fs::remove_file(&self.path) {
                warn!("{} cannot be removed: {error}", self.path.display());
            }
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let bind = |source| SocketError::Bind {
        path: path.into(),
        source,
    };
    let metadata = fs::symlink_metadata(path).map_err(bind)?;
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.into() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        _ => return Err(SocketError::InUse { path: path.into() }),
    }
    info!(
        "stale socket {} replaced: no process listens on it",
        path.display()
    );
    fs::remove_file(path).map_err(bind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r13_a_living_listener_keeps_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = SocketListener::bind(&path).unwrap();
        assert!(matches!(
            SocketListener::bind(&path),
            Err(SocketError::InUse { .. })
        ));
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn r13_a_dead_listeners_path_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = SocketListener::bind(&path).unwrap();
        assert!(UnixStream::connect(listener.path()).is_ok());
    }

    #[test]
    fn r13_what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            SocketListener::bind(&path),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn r13_only_the_own_path_is_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = SocketListener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}

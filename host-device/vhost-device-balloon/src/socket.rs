// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Listening Unix sockets in the file system. A listener does not replace the socket of a running process, and removes
//! its own when it is dropped.
//!
//! A lock on the file `PATH.lock` decides which of several starting processes may replace a stale socket. The listener
//! holds it until it has removed both files. The kernel releases the lock of a killed process.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation, OFlags};
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
    /// The lock file has content, so it is a file of somebody else. It is not changed.
    #[error("{path} exists and is not a lock file: remove it, or choose another path")]
    NotALock {
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

/// How often the lock is tried again that another process has just released.
const LOCK_ATTEMPTS: usize = 100;

/// A listening socket at a path. Dropping it removes the path.
#[derive(Debug)]
pub struct SocketListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file. Another process may have replaced the file since.
    file: Option<(u64, u64)>,
    /// Dropped after the socket file is removed.
    _lock: PathLock,
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
        let lock = PathLock::take(path)?;
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
            _lock: lock,
        })
    }

    /// Returns the path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the next connection in the backlog, if there is one.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors or memory left. The connection stays in the backlog.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                // The other side may have closed a connection in the backlog.
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => Err(error),
            },
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
    Some(inode(&fs::symlink_metadata(path).ok()?))
}

fn inode(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The exclusive right to bind a path. Dropping it removes the lock file, and releases the lock.
#[derive(Debug)]
struct PathLock {
    file: File,
    path: PathBuf,
}

impl PathLock {
    /// Takes the lock for the socket at `socket`.
    fn take(socket: &Path) -> Result<Self, SocketError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |source| SocketError::Bind {
            path: path.clone(),
            source,
        };
        for _ in 0..LOCK_ATTEMPTS {
            let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
            let file = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(i32::from_ne_bytes(flags.bits().to_ne_bytes()))
                .open(&path)
                .map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(SocketError::InUse {
                        path: socket.into(),
                    })
                }
                Err(error) => return Err(failed(error.into())),
            }
            // The process that held the lock before may have removed the file meanwhile. Then this lock is worthless.
            let metadata = file.metadata().map_err(failed)?;
            if identity(&path) != Some(inode(&metadata)) {
                continue;
            }
            // The lock file is removed at the end.
            if metadata.len() > 0 {
                return Err(SocketError::NotALock { path });
            }
            return Ok(Self { file, path });
        }
        Err(SocketError::InUse {
            path: socket.into(),
        })
    }
}

impl Drop for PathLock {
    fn drop(&mut self) {
        // Only the owner of the lock removes the file, so no other process can have locked another one at this path.
        let is_own = self.file.metadata().ok().map(|it| inode(&it)) == identity(&self.path);
        if is_own {
            if let Err(error) = fs::remove_file(&self.path) {
                warn!("{} cannot be removed: {error}", self.path.display());
            }
        }
    }
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
    fn r13_a_file_with_the_name_of_the_lock_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let other = directory.path().join("s.lock");
        fs::write(&other, "precious").unwrap();
        assert!(matches!(
            SocketListener::bind(&path),
            Err(SocketError::NotALock { .. })
        ));
        assert_eq!(fs::read(&other).unwrap(), b"precious");
        assert!(!path.exists());
    }

    #[test]
    fn r13_one_of_many_starters_replaces_a_stale_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        for _ in 0..100 {
            drop(UnixListener::bind(&path).unwrap());
            let start = std::sync::Barrier::new(8);
            let listeners: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            start.wait();
                            SocketListener::bind(&path)
                        })
                    })
                    .collect();
                let results = threads.into_iter().map(|it| it.join().unwrap());
                results.filter_map(Result::ok).collect()
            });
            assert_eq!(listeners.len(), 1);
            assert!(UnixStream::connect(&path).is_ok());
            drop(listeners);
            assert!(directory.path().read_dir().unwrap().next().is_none());
        }
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

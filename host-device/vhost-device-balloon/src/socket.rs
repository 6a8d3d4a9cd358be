// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Listening Unix sockets in the file system. A listener does not replace the socket of a running process, and removes
//! its own when it is dropped.
//!
//! A lock on the file `PATH.lock` decides which of several starting processes may replace a stale socket. The listener
//! holds it until it has removed both files. The kernel releases the lock of a killed process.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation, OFlags};
use serde::{Deserialize, Serialize};
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

/// The files of a listening socket: the socket, and the lock of its path. Each is named with its device and inode, because
/// another process may replace it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SocketFiles {
    // Unlike a path, this can be any bytes in JSON.
    socket: OsString,
    socket_inode: Option<(u64, u64)>,
    lock: OsString,
    lock_inode: Option<(u64, u64)>,
}

impl SocketFiles {
    /// Removes the socket, and then the lock. Leaves files of other processes alone.
    ///
    /// # Errors
    ///
    /// If a file cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        let socket = remove_own(self.socket.as_ref(), self.socket_inode);
        // Only the owner of the lock removes the file, so no other process can have locked another one at this path.
        socket.and(remove_own(self.lock.as_ref(), self.lock_inode))
    }
}

/// Removes the file at `path`, if it has this device and inode.
fn remove_own(path: &Path, own: Option<(u64, u64)>) -> io::Result<()> {
    if own.is_some() && own == identity(path) {
        fs::remove_file(path).map_err(|error| {
            io::Error::other(format!("{} cannot be removed: {error}", path.display()))
        })?;
    }
    Ok(())
}

/// Removes the files of a socket.
type Remove = Box<dyn Fn(&SocketFiles) -> io::Result<()> + Send>;

/// A listening socket at a path. Dropping it removes the path.
pub struct SocketListener {
    listener: UnixListener,
    files: SocketFiles,
    remove: Remove,
    /// Closed after the files are removed, which releases the lock.
    _lock: File,
}

impl std::fmt::Debug for SocketListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SocketListener").field(&self.files).finish()
    }
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
        let (lock, lock_path) = take_lock(path)?;
        let mut files = SocketFiles {
            socket: path.into(),
            socket_inode: None,
            lock_inode: identity(&lock_path),
            lock: lock_path.into(),
        };
        let bound = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path).and_then(|()| UnixListener::bind(path).map_err(bind))
            }
            other => other.map_err(bind),
        };
        let listener = bound.and_then(|listener| {
            files.socket_inode = identity(path);
            listener.set_nonblocking(true).map_err(bind)?;
            Ok(listener)
        });
        match listener {
            Ok(listener) => Ok(Self {
                listener,
                files,
                remove: Box::new(SocketFiles::remove),
                _lock: lock,
            }),
            Err(error) => {
                log_error(files.remove());
                Err(error)
            }
        }
    }

    /// Returns the files of the socket.
    pub fn files(&self) -> &SocketFiles {
        &self.files
    }

    /// Lets `remove` remove the files at the end, instead of this process.
    #[must_use]
    pub fn removed_by(
        mut self,
        remove: impl Fn(&SocketFiles) -> io::Result<()> + Send + 'static,
    ) -> Self {
        self.remove = Box::new(remove);
        self
    }

    /// Returns the path.
    pub fn path(&self) -> &Path {
        self.files.socket.as_ref()
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
        log_error((self.remove)(&self.files));
    }
}

fn log_error(result: io::Result<()>) {
    if let Err(error) = result {
        warn!("{error}");
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    Some(inode(&fs::symlink_metadata(path).ok()?))
}

fn inode(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Takes the exclusive right to bind the path `socket`. Returns the file that holds the lock, and its path.
fn take_lock(socket: &Path) -> Result<(File, PathBuf), SocketError> {
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
        return Ok((file, path));
    }
    Err(SocketError::InUse {
        path: socket.into(),
    })
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

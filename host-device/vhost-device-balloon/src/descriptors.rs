// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The descriptors that a front end sends for the kicks and calls of queues, and for messages of the device.
//!
//! The thread of the queues reads and writes them, in part under the device's lock, so they must never block. Each is
//! made non-blocking. `O_NONBLOCK` belongs to the open file description, which the front end may share: then its own
//! reads and writes of this description do not wait any longer either. That is how QEMU's vhost-user servers treat each
//! descriptor that is not memory. Front ends are prepared for it: QEMU, Firecracker and cloud-hypervisor create
//! non-blocking event descriptors, and interrupts that KVM takes are not read by the front end at all. User-mode Linux
//! takes interrupts from the read end of a pipe. That is another description than the write end, and is not affected.
//!
//! Only files whose reads and writes obey `O_NONBLOCK` are accepted: event descriptors and other anonymous inodes of the
//! kernel, pipes and sockets. A file on FUSE, for example, may block whatever its flags.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{fcntl_getfl, fcntl_setfl, fstat, FileType, OFlags};
use thiserror::Error;

/// Why a kick or call descriptor is refused.
#[derive(Debug, Error)]
pub(crate) enum DescriptorError {
    /// Reads and writes may block whatever the flags.
    #[error("it is a {0}; use an event descriptor, a pipe or a socket")]
    Kind(&'static str),
    /// The host reported an error.
    #[error("it cannot be made non-blocking: {0}")]
    Io(#[from] io::Error),
}

/// Makes a kick or call descriptor non-blocking.
///
/// # Errors
///
/// If it is a file that may block nevertheless, or if the host reports an error.
pub(crate) fn make_nonblocking(fd: impl AsFd) -> Result<(), DescriptorError> {
    let refused = match FileType::from_raw_mode(fstat(&fd).map_err(io::Error::from)?.st_mode) {
        // An anonymous inode has no type.
        FileType::Fifo | FileType::Socket | FileType::Unknown => None,
        FileType::RegularFile => Some("regular file"),
        FileType::Directory => Some("directory"),
        FileType::CharacterDevice => Some("character device"),
        FileType::BlockDevice => Some("block device"),
        FileType::Symlink => Some("symbolic link"),
    };
    if let Some(kind) = refused {
        return Err(DescriptorError::Kind(kind));
    }
    let flags = fcntl_getfl(&fd).map_err(io::Error::from)?;
    if !flags.contains(OFlags::NONBLOCK) {
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use rustix::event::{eventfd, EventfdFlags};

    use super::*;

    #[test]
    fn what_can_be_a_kick_or_call_does_not_block() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (socket, _other) = UnixStream::pair().unwrap();
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        let fds = [
            reader.as_fd(),
            writer.as_fd(),
            socket.as_fd(),
            event.as_fd(),
        ];
        for fd in fds {
            make_nonblocking(fd).unwrap();
            assert!(fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK));
        }
    }

    #[test]
    fn a_file_that_may_block_whatever_its_flags_is_refused() {
        for (path, kind) in [
            ("/dev/null", "character device"),
            ("/proc/self/stat", "regular file"),
            ("/", "directory"),
        ] {
            let error = make_nonblocking(File::open(path).unwrap()).unwrap_err();
            assert!(error.to_string().contains(kind), "{error}");
        }
    }
}

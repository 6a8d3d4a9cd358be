// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The descriptors that a front end sends for the kicks and calls of queues, and for messages of the device.
//!
//! The thread of the queues reads and writes them, so they must never block. Each is made non-blocking. `O_NONBLOCK`
//! belongs to the open file description, which the front end may share: then its own reads and writes of this
//! description do not wait any longer either. That is how QEMU's vhost-user servers treat each descriptor that is not
//! memory. Front ends are prepared for it: QEMU, Firecracker and cloud-hypervisor create non-blocking event descriptors,
//! and interrupts that KVM takes are not read by the front end at all. User-mode Linux takes interrupts from the read end
//! of a pipe. That is another description than the write end, and is not affected.
//!
//! A front end can also clear the flag again at any time. A [`SharedDescriptor`] therefore asks for each read and write
//! that it does not wait.
//!
//! Only files whose reads and writes obey `O_NONBLOCK` are accepted: event descriptors and other anonymous inodes of the
//! kernel, pipes and Unix sockets. A file on FUSE, for example, may block whatever its flags.
//!
//! Closing a descriptor must not wait either. The last `close` of a TCP socket with `SO_LINGER` waits for its peer, so
//! [`check_sockets`] refuses all sockets but Unix sockets, whatever the message that they come with.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{fcntl_getfl, fcntl_setfl, statx, AtFlags, FileType, OFlags, Statx, StatxFlags};
use rustix::io::{preadv2, pwritev2, Errno, ReadWriteFlags};
use rustix::net::{recv, send, sockopt, AddressFamily, RecvFlags, SendFlags};
use thiserror::Error;

/// The offset for [`preadv2`] and [`pwritev2`] of a file without positions.
const NO_OFFSET: u64 = u64::MAX;

/// Why a descriptor is refused.
#[derive(Debug, Error)]
pub(crate) enum DescriptorError {
    /// A socket that is no Unix socket may wait when it is closed.
    #[error("it is a socket of another kind than a Unix socket")]
    Family,
    /// The daemon would keep its own connection open, and never learn that the front end has ended.
    #[error("it is the front end's end of a connection to this daemon")]
    OwnConnection,
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
    let refused = match file_type(fd.as_fd())? {
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

/// Checks the sockets among the descriptors of a message. `connection` is the connection that they came through.
///
/// # Errors
///
/// If one of them is no Unix socket, or is an end of a connection to the address of `connection`.
pub(crate) fn check_sockets(
    fds: &[OwnedFd],
    connection: &UnixStream,
) -> Result<(), DescriptorError> {
    for fd in fds {
        if file_type(fd.as_fd())? != FileType::Socket {
            continue;
        }
        if sockopt::socket_domain(fd).map_err(io::Error::from)? != AddressFamily::UNIX {
            // Then `close` resets the connection. Not all kinds of sockets have connections.
            let _ = sockopt::set_socket_linger(fd, Some(Duration::ZERO));
            return Err(DescriptorError::Family);
        }
        // The peer of a front end's end is the daemon's end, whose address is that of the daemon's listener. A socket
        // without a peer has no such address.
        let peer = UnixStream::from(fd.try_clone()?).peer_addr().ok();
        let peer = peer.as_ref().and_then(SocketAddr::as_pathname);
        let own = connection.local_addr()?;
        if peer.is_some() && peer == own.as_pathname() {
            return Err(DescriptorError::OwnConnection);
        }
    }
    Ok(())
}

fn file_type(fd: BorrowedFd<'_>) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(known_of(fd)?.stx_mode.into()))
}

/// Returns what the kernel knows of a file, without a question to the server of its file system: that of FUSE may never
/// answer, and no signal ends the wait for it.
///
/// # Errors
///
/// If the host reports an error.
pub(crate) fn known_of(fd: impl AsFd) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    Ok(statx(fd, c"", flags, StatxFlags::TYPE)?)
}

/// A descriptor that the front end has sent and may share. Reads and writes do not wait, whatever the front end does to
/// the flags of its description.
#[derive(Debug)]
pub(crate) struct SharedDescriptor {
    fd: OwnedFd,
    is_socket: bool,
    /// Whether the kernel has refused writes with `RWF_NOWAIT`, as it does for event descriptors. Every interrupt would
    /// cost one more system call.
    no_nowait_write: AtomicBool,
}

impl SharedDescriptor {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let is_socket = file_type(fd.as_fd()).is_ok_and(|kind| kind == FileType::Socket);
        Self {
            fd,
            is_socket,
            no_nowait_write: AtomicBool::new(false),
        }
    }

    /// Reads into `buffer`, and returns the number of bytes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WouldBlock`] if there is nothing to read, or the error of the host.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_socket {
            let (length, _) = recv(&self.fd, buffer, RecvFlags::DONTWAIT)?;
            return Ok(length);
        }
        let slices = &mut [IoSliceMut::new(buffer)];
        match preadv2(&self.fd, slices, NO_OFFSET, ReadWriteFlags::NOWAIT) {
            Err(Errno::OPNOTSUPP) => {}
            result => return Ok(result?),
        }
        self.check_ready(PollFlags::IN)?;
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Writes `bytes`, and returns the number of bytes that were written.
    ///
    /// The kernel has no write to an event descriptor that certainly does not wait. A front end that clears `O_NONBLOCK`
    /// and fills the counter in the moment before the write can make it wait. Call this without a lock for such a
    /// descriptor.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WouldBlock`] if there is no room, or the error of the host.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_socket {
            return Ok(send(
                &self.fd,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )?);
        }
        if !self.no_nowait_write.load(Ordering::Relaxed) {
            let slices = &[IoSlice::new(bytes)];
            match pwritev2(&self.fd, slices, NO_OFFSET, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP) => self.no_nowait_write.store(true, Ordering::Relaxed),
                result => return Ok(result?),
            }
        }
        self.check_ready(PollFlags::OUT)?;
        Ok(rustix::io::write(&self.fd, bytes)?)
    }

    /// Checks that the kernel reports `event`, and sets `O_NONBLOCK` again.
    fn check_ready(&self, event: PollFlags) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.fd, event)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if poll(&mut fds, Some(&now))? == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        Ok(fcntl_setfl(&self.fd, OFlags::NONBLOCK)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use rustix::event::{eventfd, EventfdFlags};
    use rustix::net::SocketType;

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
    /// A front end clears the flag of a description that it shares after the device has set it.
    #[test]
    fn nothing_waits_although_the_flag_is_cleared_again() {
        let clear = |fd: &OwnedFd| {
            make_nonblocking(fd).unwrap();
            fcntl_setfl(fd, OFlags::empty()).unwrap();
        };
        let (reader, writer) = std::io::pipe().unwrap();
        let (socket, other) = UnixStream::pair().unwrap();
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        let pairs: [(OwnedFd, OwnedFd); 3] = [
            (reader.into(), writer.into()),
            (socket.into(), other.into()),
            (event.try_clone().unwrap(), event),
        ];
        for (reader, writer) in pairs {
            clear(&reader);
            clear(&writer);
            let (reader, writer) = (SharedDescriptor::new(reader), SharedDescriptor::new(writer));
            let would_block = |result: io::Result<usize>| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::WouldBlock);
            };
            would_block(reader.read(&mut [0; 8]));
            let one = 1u64.to_ne_bytes();
            assert_eq!(writer.write(&one).unwrap(), 8);
            let mut count = [0; 8];
            assert_eq!(reader.read(&mut count).unwrap(), 8);
            assert_eq!(count, one);
            let most = (u64::MAX - 1).to_ne_bytes();
            while writer.write(&most).is_ok() {
                fcntl_setfl(&writer.fd, OFlags::empty()).unwrap();
            }
            fcntl_setfl(&writer.fd, OFlags::empty()).unwrap();
            would_block(writer.write(&one));
        }
    }

    #[test]
    fn an_end_of_the_own_connection_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let front_end = UnixStream::connect(&path).unwrap();
        let (connection, _) = listener.accept().unwrap();
        let error = check_sockets(&[front_end.into()], &connection).unwrap_err();
        assert!(matches!(error, DescriptorError::OwnConnection), "{error}");
        // Another listener, whose address has no room for a NUL.
        let directory = folder.path().as_os_str().len();
        let path = folder.path().join("s".repeat(107 - directory));
        let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
        let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let stream = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::connect(&stream, &address).unwrap();
        check_sockets(&[stream, listener], &connection).unwrap();
    }

    #[test]
    fn a_socket_that_may_wait_when_it_is_closed_is_refused() {
        let (connection, other) = UnixStream::pair().unwrap();
        check_sockets(&[other.into()], &connection).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = check_sockets(&[listener.into()], &connection).unwrap_err();
        assert!(matches!(error, DescriptorError::Family), "{error}");
    }
}

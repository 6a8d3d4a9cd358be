// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connects the channels of a stream, or opens the only one.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{
    connect, socket_with, sockopt, AddressFamily, SocketAddrUnix, SocketFlags, SocketType,
};

use super::control::Control;
use super::socket_options::{duplicate_fd, set_socket_options};
use super::{Address, StreamError};

/// Delay before another attempt to connect to a Unix socket whose queue is full.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Connects `channels` channels to `address`, or opens the address for writing.
pub(super) fn connect_to(
    address: &Address,
    channels: u16,
    control: &Control,
    timeout: Duration,
) -> Result<Vec<OwnedFd>, StreamError> {
    if channels > 1 && matches!(address, Address::File(_) | Address::Fd(_)) {
        return Err(StreamError::Options(format!(
            "several channels need an address that accepts several connections; {address} accepts only one"
        )));
    }
    (0..channels)
        .map(|_| match connect_once(address, control, timeout) {
            Ok(Ok(fd)) => Ok(fd),
            Ok(Err(error)) => Err(StreamError::Connect {
                address: address.clone(),
                source: Arc::new(error),
            }),
            Err(stopped) => Err(stopped),
        })
        .collect()
}

/// Connects or opens one channel.
///
/// The inner error is a failure to connect or open. The outer error is the reason of a stopped stream, or a failure to
/// wait.
fn connect_once(
    address: &Address,
    control: &Control,
    timeout: Duration,
) -> Result<io::Result<OwnedFd>, StreamError> {
    Ok(match address {
        Address::Unix(path) => {
            let target = match SocketAddrUnix::new(path) {
                Ok(target) => target,
                Err(error) => return Ok(Err(error.into())),
            };
            connect_socket(AddressFamily::UNIX, &target, control, timeout)?
        }
        Address::Tcp(host, port) => {
            let found = match (host.as_str(), *port).to_socket_addrs() {
                Ok(found) => found,
                Err(error) => return Ok(Err(error)),
            };
            let mut last = Err(io::Error::other("host name has no address"));
            for target in found {
                let family = match target {
                    SocketAddr::V4(_) => AddressFamily::INET,
                    SocketAddr::V6(_) => AddressFamily::INET6,
                };
                last = connect_socket(family, &target, control, timeout)?;
                if last.is_ok() {
                    break;
                }
            }
            last
        }
        Address::File(path) => open_file(path, control, timeout)?,
        Address::Fd(number) => duplicate_fd(*number),
    })
}

/// Opens a file for writing. Waits for at most `timeout` until a FIFO has a reader: opening it without
/// [`OFlags::NONBLOCK`] would wait in the kernel, where nothing can stop it.
fn open_file(
    path: &Path,
    control: &Control,
    timeout: Duration,
) -> Result<io::Result<OwnedFd>, StreamError> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    let end = Instant::now().checked_add(timeout);
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            // Only the owner may read guest memory.
            .mode(0o600)
            .custom_flags(i32::from_ne_bytes(flags.to_ne_bytes()))
            .open(path);
        let has_no_reader = |error: &io::Error| {
            error.raw_os_error() == Some(Errno::NXIO.raw_os_error())
                && path.metadata().is_ok_and(|it| it.file_type().is_fifo())
        };
        match file {
            Err(error) if has_no_reader(&error) => {
                if end.is_none_or(|end| Instant::now() >= end) {
                    return Ok(Err(io::Error::new(
                        ErrorKind::TimedOut,
                        "FIFO has no reader",
                    )));
                }
                control.sleep(RETRY_INTERVAL)?;
            }
            other => return Ok(other.map(OwnedFd::from)),
        }
    }
}

fn connect_socket(
    family: AddressFamily,
    target: &impl rustix::net::addr::SocketAddrArg,
    control: &Control,
    timeout: Duration,
) -> Result<io::Result<OwnedFd>, StreamError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = match socket_with(family, SocketType::STREAM, flags, None) {
        Ok(fd) => fd,
        Err(error) => return Ok(Err(error.into())),
    };
    let end = Instant::now().checked_add(timeout);
    loop {
        match connect(&fd, target) {
            Ok(()) => break,
            // The queue of the Unix socket is full.
            Err(Errno::AGAIN) if end.is_some_and(|end| Instant::now() < end) => {
                control.sleep(RETRY_INTERVAL)?;
            }
            Err(Errno::AGAIN) => return Ok(Err(io::ErrorKind::TimedOut.into())),
            Err(Errno::INPROGRESS | Errno::INTR) => {
                let ready = control.wait(fd.as_fd(), PollFlags::OUT, Some(timeout))?;
                if ready.is_none() {
                    return Ok(Err(io::ErrorKind::TimedOut.into()));
                }
                match sockopt::socket_error(&fd) {
                    Ok(Ok(())) => break,
                    Ok(Err(error)) | Err(error) => return Ok(Err(error.into())),
                }
            }
            Err(error) => return Ok(Err(error.into())),
        }
    }
    set_socket_options(&fd);
    Ok(Ok(fd))
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection to a Unix socket, with a timeout.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{
    connect as connect_socket, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::deadline::Deadline;

/// The longest time for which the kernel waits at once.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Connects to the socket at `path`.
///
/// A connection waits as long as the queue of the listener is full: its program may be stopped, or may serve one client
/// at a time.
///
/// # Errors
///
/// The error of the host, or [`ErrorKind::TimedOut`].
pub fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let deadline = Deadline::after(timeout);
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        let left = deadline.left().clamp(Duration::from_millis(1), WAIT_MAX);
        set_socket_timeout(&socket, Timeout::Send, Some(left))?;
        match connect_socket(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN | Errno::INTR) if !deadline.left().is_zero() => {}
            Err(Errno::AGAIN | Errno::INTR) => {
                let text = format!(
                    "its program did not accept the connection within {timeout:?}: check that it is not stopped, and that no other client is connected"
                );
                return Err(io::Error::new(ErrorKind::TimedOut, text));
            }
            Err(error) => return Err(error.into()),
        }
    }
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket.into())
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection for the crate `vhost-user-backend`, which serves only what it accepts itself.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// A listener with one connection in its backlog, and the other end of that connection.
#[derive(Debug)]
pub struct PrivateConnection {
    pub(crate) listener: UnixListener,
    pub(crate) stream: UnixStream,
}

impl PrivateConnection {
    /// Creates the connection.
    ///
    /// The kernel chooses an address in the abstract namespace, so nothing is created in the file system. Others can see
    /// such an address and connect to it. The backlog has room for one connection only, so if ours is in it, it is the one
    /// that will be accepted.
    ///
    /// # Errors
    ///
    /// If the host has no descriptors left.
    pub fn new() -> io::Result<Self> {
        /// Each further attempt means that another process connected within microseconds.
        const ATTEMPTS: usize = 16;
        let socket = || -> io::Result<OwnedFd> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (domain, kind) = (AddressFamily::UNIX, SocketType::STREAM);
            Ok(rustix::net::socket_with(domain, kind, flags, None)?)
        };
        for _ in 0..ATTEMPTS {
            let (listener, stream) = (socket()?, socket()?);
            rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
            rustix::net::listen(&listener, 0)?;
            match rustix::net::connect(&stream, &rustix::net::getsockname(&listener)?) {
                Ok(()) => {
                    let connection = Self {
                        listener: UnixListener::from(listener),
                        stream: UnixStream::from(stream),
                    };
                    connection.stream.set_nonblocking(false)?;
                    return Ok(connection);
                }
                // The backlog is full.
                Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other(
            "another process connects to each private socket of the daemon",
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn nobody_else_is_in_the_backlog_of_a_private_connection() {
        let PrivateConnection {
            listener,
            mut stream,
        } = PrivateConnection::new().unwrap();
        let address = listener.local_addr().unwrap();
        assert!(address.as_pathname().is_none());
        // There is no room for another connection.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let intruder =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let address = rustix::net::getsockname(&listener).unwrap();
        let refused = rustix::net::connect(&intruder, &address).unwrap_err();
        assert_eq!(refused, rustix::io::Errno::AGAIN);
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.write_all(b"mine").unwrap();
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"mine");
    }
}

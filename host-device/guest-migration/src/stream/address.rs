// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Addresses of streams, in the syntax of QEMU's migration addresses.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// The address to which a stream is sent, or at which it is received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `unix:PATH`: a Unix socket. Two-way.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`: a TCP connection. Two-way. An IPv6 address is written in brackets.
    Tcp(String, u16),
    /// `file:PATH`: a file that the sender writes and the receiver reads. One-way.
    File(PathBuf),
    /// `fd:N`: an open file descriptor of this process: a stream socket (two-way), a pipe or a file (one-way). For a
    /// receiver also a listening socket.
    ///
    /// The stream uses a duplicate. The descriptor stays open in the process, so the reader of a pipe sees the end of
    /// an aborted stream only after the owner of the descriptor closes it.
    Fd(i32),
}

/// The error for a text that is not an [`Address`].
#[derive(Debug, Clone, Error, PartialEq, Eq)]
#[error("'{text}' is not an address: {why}; use unix:PATH, tcp:HOST:PORT, file:PATH or fd:NUMBER")]
pub struct AddressError {
    text: String,
    why: &'static str,
}

/// The flag of a descriptor that ends with the program, in the numbers of `/proc/PID/fdinfo`.
const O_CLOEXEC: u32 = 0o2_000_000;

impl Address {
    /// Checks that a descriptor is one that the program got from its caller. Its own ones, such as those of guest memory
    /// and of other connections, are no place for a stream. They close when a program is executed, so none of them was
    /// there at the start.
    ///
    /// # Errors
    ///
    /// If it is a descriptor of this program, or the host reports an error. A descriptor that does not exist is no error
    /// here.
    pub fn check_inherited(&self) -> io::Result<()> {
        let Self::Fd(number) = self else {
            return Ok(());
        };
        let info = match fs::read_to_string(format!("/proc/self/fdinfo/{number}")) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|it| u32::from_str_radix(it.trim(), 8).ok());
        match flags {
            Some(flags) if flags & O_CLOEXEC == 0 => Ok(()),
            _ => Err(io::Error::new(
                ErrorKind::PermissionDenied,
                format!(
                    "'{self}' is a descriptor of this program itself; use one that its caller has opened for it"
                ),
            )),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = |why| AddressError {
            text: text.to_owned(),
            why,
        };
        let (kind, rest) = text
            .split_once(':')
            .ok_or_else(|| error("the kind is missing"))?;
        if rest.is_empty() {
            return Err(error("the part after the colon is empty"));
        }
        match kind {
            "unix" => Ok(Self::Unix(rest.into())),
            "file" => Ok(Self::File(rest.into())),
            "fd" => match rest.parse() {
                Ok(number) if number >= 0 => Ok(Self::Fd(number)),
                _ => Err(error("the file descriptor is not a number")),
            },
            "tcp" => {
                let (host, port) = rest
                    .rsplit_once(':')
                    .ok_or_else(|| error("the port is missing"))?;
                let host = match host.strip_prefix('[') {
                    Some(inner) => inner
                        .strip_suffix(']')
                        .ok_or_else(|| error("the closing bracket is missing"))?,
                    None if host.contains(':') => {
                        return Err(error("an IPv6 address needs brackets"))
                    }
                    None => host,
                };
                let port = port
                    .parse()
                    .map_err(|_| error("the port is not a number from 0 to 65535"))?;
                Ok(Self::Tcp(host.to_owned(), port))
            }
            _ => Err(error("the kind is unknown")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Fd(number) => write!(f, "fd:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_the_program_itself_is_no_address() {
        use std::os::fd::AsRawFd;
        let file = tempfile::tempfile().unwrap();
        let address = Address::Fd(file.as_raw_fd());
        let error = address.check_inherited().unwrap_err().to_string();
        assert!(error.contains("of this program itself"), "{error}");
        // As the caller of a program opens it.
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
        address.check_inherited().unwrap();
        for other in ["fd:1073741824", "file:/tmp/x"] {
            other.parse::<Address>().unwrap().check_inherited().unwrap();
        }
    }

    #[test]
    fn addresses_read_back_as_written() {
        for text in [
            "unix:/run/a b",
            "unix:relative",
            "tcp:localhost:4444",
            "tcp::4444",
            "tcp:[::1]:1",
            "file:/tmp/x:y",
            "fd:0",
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn anything_else_says_why() {
        for (text, why) in [
            ("/run/socket", "kind is missing"),
            ("unix:", "is empty"),
            ("exec:cat", "unknown"),
            ("tcp:host", "port is missing"),
            ("tcp:host:70000", "65535"),
            ("tcp:::1:5", "brackets"),
            ("tcp:[::1:5", "bracket is missing"),
            ("fd:-1", "number"),
            ("fd:stdin", "number"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(text), "{error}");
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Options of sockets and pipes, and duplicates of file descriptors that have them.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{sockopt, AddressFamily};
use rustix::process::{getpid, pidfd_getfd, pidfd_open, PidfdFlags, PidfdGetfdFlags};

/// TCP keep-alive: silence before the first probe. With the two constants below, a dead host is noticed after 25 s.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// TCP keep-alive: interval between probes.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
/// TCP keep-alive: number of unanswered probes after which the connection fails.
const KEEP_ALIVE_PROBES: u32 = 3;
/// The buffer size that is requested for a socket or a pipe, in bytes. The kernel may grant less.
const BUFFER: usize = 1 << 20;

/// Sets socket options for throughput, and for noticing a dead peer. Ignores failures.
pub(super) fn set_socket_options(fd: &OwnedFd) {
    let _ = sockopt::set_socket_send_buffer_size(fd, BUFFER);
    let family = sockopt::socket_domain(fd);
    if family == Ok(AddressFamily::INET) || family == Ok(AddressFamily::INET6) {
        // The encoder batches records, so the kernel does not need to.
        let _ = sockopt::set_tcp_nodelay(fd, true);
        let _ = sockopt::set_socket_keepalive(fd, true);
        let _ = sockopt::set_tcp_keepidle(fd, KEEP_ALIVE);
        let _ = sockopt::set_tcp_keepintvl(fd, KEEP_ALIVE_EVERY);
        let _ = sockopt::set_tcp_keepcnt(fd, KEEP_ALIVE_PROBES);
    }
}

/// Returns a duplicate of the file descriptor `number` of this process.
pub(super) fn duplicate_fd(number: i32) -> io::Result<OwnedFd> {
    // The owner of the descriptor is unknown, so it cannot be borrowed. `pidfd_getfd` takes a bare number.
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    let fd = pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?;
    set_socket_options(&fd);
    let _ = rustix::pipe::fcntl_setpipe_size(&fd, BUFFER);
    Ok(fd)
}

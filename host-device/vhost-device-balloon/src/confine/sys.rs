// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! System calls and the handler of SIGSYS.
//!
//! The kernel sends SIGSYS instead of executing a forbidden system call. The handler names the call on standard error, and
//! the signal then kills the process. It runs in the middle of any statement of any thread: it takes no lock, allocates
//! nothing, and uses only system calls that are permitted.

use std::io;
use std::mem::zeroed;

use rustix::thread::unshare_unsafe;

pub(super) use rustix::thread::UnshareFlags;

use super::system_calls;

/// Moves the calling thread into new namespaces.
///
/// # Errors
///
/// If the host forbids it, or if another thread exists and `flags` has a user namespace.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    if flags.contains(UnshareFlags::FILES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: Without `FILES`, checked above, threads keep sharing their table of file descriptors, which is all that the
    // function requires.
    Ok(unsafe { unshare_unsafe(flags) }?)
}

/// Installs the handler of SIGSYS.
///
/// # Errors
///
/// If the host reports an error.
pub(super) fn name_forbidden_calls() -> io::Result<()> {
    // SAFETY: `sigaction` is a C structure of integers and an optional function, for which all zeros are valid.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = handle_sigsys as *const () as libc::sighandler_t;
    // After the first signal the default action is back, which kills the process.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND;
    // SAFETY: `action` is valid, has an empty mask, and `handle_sigsys` has the type that SA_SIGINFO requires and calls
    // only functions that are async-signal-safe.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The index of the number of the system call in `siginfo_t`, as an array of integers: after signal, error and code, padding
/// and the address of the instruction, on a host with addresses of 64 bits.
const NUMBER_INDEX: usize = 6;

extern "C" fn handle_sigsys(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: The kernel passes a valid `info`, which has 128 bytes. Each integer in it is initialised by the kernel.
    let number = unsafe { *info.cast::<libc::c_int>().add(NUMBER_INDEX) };
    let mut line = Line::default();
    line.add(b"seccomp: system call ");
    line.add(system_calls::name(number.into()).as_bytes());
    line.add(b" (");
    line.add_number(number.unsigned_abs());
    line.add(b") is forbidden; the daemon is killed\n");
    // Standard error may be a pipe without a reader: then the line is lost.
    let mut stderr = libc::pollfd {
        fd: libc::STDERR_FILENO,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: `stderr` is one valid structure.
    let ready = unsafe { libc::poll(&mut stderr, 1, 0) };
    if ready > 0 && stderr.revents & libc::POLLOUT != 0 {
        let bytes = line.bytes();
        // SAFETY: `bytes` is valid for reads of its length. An error of the host loses the line.
        unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
    }
    // SAFETY: `raise` has no preconditions. The signal is delivered when this handler returns, with its default action.
    unsafe { libc::raise(signal) };
}

/// A line in a buffer of fixed length. What does not fit is cut off.
struct Line {
    buffer: [u8; 128],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            buffer: [0; 128],
            length: 0,
        }
    }
}

impl Line {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(slot) = self.buffer.get_mut(self.length) {
                *slot = *byte;
                self.length += 1;
            }
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        let mut has_digits = false;
        while divisor > 0 {
            let digit = number / divisor % 10;
            has_digits |= digit > 0 || divisor == 1;
            if has_digits {
                self.add(&[b'0' + digit as u8]);
            }
            divisor /= 10;
        }
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_numbers_and_an_end() {
        let mut line = Line::default();
        for number in [0, 7, 450, u32::MAX] {
            line.add_number(number);
            line.add(b" ");
        }
        assert_eq!(line.bytes(), b"0 7 450 4294967295 ");
        line.add(&[b'x'; 200]);
        assert_eq!(line.bytes().len(), 128);
    }
}

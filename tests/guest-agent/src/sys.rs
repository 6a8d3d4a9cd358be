// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `unsafe` code: system calls that no crate wraps safely, and fork.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::unistd::{ForkResult, Pid};

/// Loads another kernel, which `reboot(2)` with `RB_KEXEC` starts.
pub fn kexec_file_load(kernel: &File, initramfs: &File, command_line: &CStr) -> io::Result<()> {
    const NO_FLAGS: libc::c_ulong = 0;
    let length = command_line.to_bytes_with_nul().len();
    // SAFETY: both descriptors stay open during the call, because their owners are borrowed. `command_line` is valid
    // for `length` bytes and ends with the NUL that kexec_file_load(2) demands. The kernel keeps no pointer after the
    // call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            length,
            command_line.as_ptr(),
            NO_FLAGS,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives the pages of private anonymous memory back to the kernel. The pages read as zeros afterwards.
///
/// `pages` must be whole pages: madvise(2) rounds the length up to a page.
pub fn madvise_dontneed(pages: &mut [u8]) -> io::Result<()> {
    // SAFETY: madvise(2) refuses an address that is not page-aligned, and callers pass whole pages, so the call affects
    // only `pages`. `pages` is borrowed mutably, so nothing else refers to these bytes. Zeros are valid values of `u8`.
    let result =
        unsafe { libc::madvise(pages.as_mut_ptr().cast(), pages.len(), libc::MADV_DONTNEED) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Forks a child that runs `work` and ends, with exit status 0 if `work` returns true and 1 otherwise. The child shares
/// the memory of this process until one of them writes.
///
/// The child has only the calling thread, but it inherits the locks of the other threads in their locked state. So
/// `work` must not allocate, take a lock or panic. Otherwise the child may block forever.
pub fn fork(work: impl FnOnce() -> bool) -> nix::Result<Pid> {
    // SAFETY: the child of a process with several threads may call only async-signal-safe functions. The child calls
    // `work`, which has the same restriction, and _exit(2), which runs no destructors or exit handlers of this process.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let status = i32::from(!work());
            // SAFETY: _exit(2) takes any status and does not return.
            unsafe { libc::_exit(status) }
        }
    }
}

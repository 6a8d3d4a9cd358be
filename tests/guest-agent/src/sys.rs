// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What here needs `unsafe`: system calls that no crate wraps safely, and a fork.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::unistd::{ForkResult, Pid};

/// Has the kernel load another one, for `reboot(2)` to start.
pub fn kexec_file_load(kernel: &File, initramfs: &File, command_line: &CStr) -> io::Result<()> {
    const NO_FLAGS: libc::c_ulong = 0;
    let length = command_line.to_bytes_with_nul().len();
    // SAFETY: kexec_file_load(2) takes two descriptors, which are open for the time of the call, and reads `length`
    // bytes, which include the final NUL as it demands, from a pointer that is valid for them. It keeps none of these.
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

/// Gives the pages of private anonymous memory back to the kernel. They hold zeroes afterwards.
pub fn madvise_dontneed(pages: &mut [u8]) -> io::Result<()> {
    // SAFETY: madvise(2) refuses a range that does not begin with a page. What it takes away is borrowed for writing, and zeroes, or
    // what a file holds, are as good as any other bytes.
    let result =
        unsafe { libc::madvise(pages.as_mut_ptr().cast(), pages.len(), libc::MADV_DONTNEED) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Has a child of this process, which shares its memory until one of them writes, do `work` and then end: with status 0 if
/// that returns true, else 1.
///
/// Other threads do not come with the child, but what they hold does: `work` must not allocate, take a lock or panic, or
/// the child may wait for ever.
pub fn fork(work: impl FnOnce() -> bool) -> nix::Result<Pid> {
    // SAFETY: a child of a process with several threads may do only what is safe in a signal handler. It calls `work`, of
    // which the same is asked, and then _exit(2), so that nothing of this process's is run or dropped twice.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let status = i32::from(!work());
            // SAFETY: _exit(2) takes any status and does not return.
            unsafe { libc::_exit(status) }
        }
    }
}

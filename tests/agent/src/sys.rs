// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one thing here that needs `unsafe`: a system call that no crate wraps.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

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

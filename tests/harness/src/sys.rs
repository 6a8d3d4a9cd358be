// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `unsafe` code: a hook that a child process runs between `fork` and `exec`, and a read of the time stamp counter.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{getpid, getppid};

/// Makes the kernel kill the child when the thread that starts it ends, for any reason.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = getpid();
    let hook = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        if getppid() == parent {
            Ok(())
        } else {
            Err(Errno::ESRCH.into())
        }
    };
    // SAFETY: the hook runs in the forked child, where only async-signal-safe functions may be called. prctl(2) and
    // getppid(2) are plain system calls. The hook does not allocate or take a lock: both errors contain only an error
    // number.
    unsafe { command.pre_exec(hook) }
}

/// Returns the host's time stamp counter, or `None` on a processor without one.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub fn time_stamp_counter() -> Option<u64> {
    // SAFETY: every x86-64 processor has the instruction, and Linux allows it to processes unless they ask it not to.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

/// Returns the host's time stamp counter, or `None` on a processor without one.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
pub fn time_stamp_counter() -> Option<u64> {
    None
}

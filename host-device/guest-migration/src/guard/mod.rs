// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guard processes: a guest that this process has paused resumes even if this process is killed.
//!
//! A destructor resumes the guest after an error or a panic, but not after `SIGKILL`. Before a guest is paused, this
//! process therefore starts another one, and tells it what it is about to pause. The guard process sees the end of its
//! parent as the end of their connection. It then resumes what it was told of, unless it was told that the guest has
//! resumed or that the switchover is complete. The parent also closes the connection if it could not resume the guest: a
//! VMM may answer again later.
//!
//! A guard process is the program of its parent, started again with [`ARGUMENT`]. A program that can be one calls
//! [`is_guard_process`] first, and [`enable`] otherwise. Without that, no guard process is started: a library cannot
//! know what another program does when it is started again.
//!
//! The guard process ignores SIGHUP, SIGINT, SIGTERM and SIGQUIT, and has a session of its own, so that whatever ends
//! its parent does not end it. It cannot help if both are killed, as the kernel and systemd may do with a whole control
//! group.

mod process;
mod resume_guard;

pub use process::{
    connect_to_parent, enable, is_guard_process, GuardError, GuardProcess, ARGUMENT,
};
pub(crate) use resume_guard::{Message, ResumeGuard};

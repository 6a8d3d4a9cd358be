// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Confines the process of the device: a guest or a front end that takes it over reaches nothing else on the host.
//!
//! Each measure works without the others, and each can be switched off:
//!
//! - `sandbox`: an empty file system, and namespaces of its own.
//! - `capabilities`: none, and none to gain.
//! - `landlock`: no access to files, TCP ports and other processes, by the kernel's rules for unprivileged programs.
//! - `seccomp`: no system call that the device does not need.
//! - No new privileges: the program of another user (set-user-ID) gains nothing.
//!
//! [`Confinement::apply`] confines the calling thread and all threads that it starts later. The sockets are open by then,
//! and the [broker process](crate::broker) does what is forbidden from now on.
//!
//! `options` are the choices, `system_calls` the tables of `seccomp`, and `sys` has the system calls without a safe function.

mod capabilities;
mod failure;
mod landlock;
mod options;
mod sandbox;
mod seccomp;
#[allow(unsafe_code)]
mod sys;
mod system_calls;

pub use options::{Sandbox, Seccomp, Switch};

use rustix::thread::set_no_new_privs;
use thiserror::Error;
use tracing::{info, warn};

/// The measures that confine a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Confinement {
    /// The sandbox. `None` stands for [`Sandbox::Namespace`] if the host permits it.
    pub sandbox: Option<Sandbox>,
    /// The filter of system calls.
    pub seccomp: Seccomp,
    /// Whether Landlock is used, as far as the kernel has it.
    pub landlock: Switch,
    /// Whether capabilities are dropped.
    pub drop_capabilities: Switch,
    /// Whether new privileges are refused. Seccomp and Landlock include that.
    pub no_new_privs: Switch,
}

impl Default for Confinement {
    fn default() -> Self {
        Self {
            sandbox: None,
            seccomp: Seccomp::Trap,
            landlock: Switch::On,
            drop_capabilities: Switch::On,
            no_new_privs: Switch::On,
        }
    }
}

impl Confinement {
    /// No measure at all.
    pub const NONE: Self = Self {
        sandbox: Some(Sandbox::None),
        seccomp: Seccomp::None,
        landlock: Switch::Off,
        drop_capabilities: Switch::Off,
        no_new_privs: Switch::Off,
    };
}

/// Why a process cannot be confined.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// The sandbox that was asked for is not possible on this host.
    #[error("sandbox cannot be set up: {0}; the host may forbid it: choose another --sandbox")]
    Sandbox(String),
    /// The capabilities cannot be dropped.
    #[error("capabilities cannot be dropped: {0}")]
    Capabilities(std::io::Error),
    /// New privileges cannot be refused.
    #[error("new privileges cannot be refused: {0}")]
    NoNewPrivs(std::io::Error),
    /// Landlock reports an error. A kernel without Landlock is no error.
    #[error("landlock cannot be used: {0}; --landlock off starts without it")]
    Landlock(String),
    /// The filter of system calls cannot be installed.
    #[error("seccomp cannot be used: {0}; --seccomp none starts without it")]
    Seccomp(String),
}

impl Confinement {
    /// Confines the calling thread, and the threads and processes that it starts later. No other thread may exist: its
    /// rights would remain.
    ///
    /// # Errors
    ///
    /// If a measure fails. Those before it remain. Without a wish for a sandbox, one that fails is no error.
    pub fn apply(&self) -> Result<(), ConfineError> {
        // The crate learns the properties of the host at the first question, from a file on older kernels.
        let _ = rustix::param::page_size();
        let sandboxed = sandbox::enter(self.sandbox.unwrap_or(Sandbox::Namespace));
        if let Err(why) = sandboxed {
            match self.sandbox {
                Some(_) => return Err(ConfineError::Sandbox(why)),
                None => warn!(
                    "sandbox is not complete: {why}; the host may forbid it (--sandbox none starts without this message)"
                ),
            }
        }
        if self.no_new_privs == Switch::On {
            set_no_new_privs(true).map_err(|error| ConfineError::NoNewPrivs(error.into()))?;
        }
        if self.drop_capabilities == Switch::On {
            capabilities::drop_all().map_err(ConfineError::Capabilities)?;
        }
        if self.landlock == Switch::On {
            let missing = landlock::restrict().map_err(ConfineError::Landlock)?;
            if let Some(missing) = missing {
                info!("landlock: the kernel has {missing}");
            }
        }
        seccomp::install(self.seccomp).map_err(ConfineError::Seccomp)
    }
}

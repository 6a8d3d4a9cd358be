// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A paused guest, as one process tells another how to resume it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::processes::Process;

/// How to resume a guest that another process has paused, with [`resume`](super::resume). Empty if that process has paused
/// nothing.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PausedGuest {
    /// Stopped processes, in the order in which they were stopped.
    pub(super) processes: Vec<Process>,
    /// QMP socket of the VMM.
    pub(super) vmm: Option<PathBuf>,
}

impl PausedGuest {
    pub(super) fn of_processes(processes: Vec<Process>) -> Self {
        Self {
            processes,
            vmm: None,
        }
    }

    pub(super) fn of_vmm(path: PathBuf) -> Self {
        Self {
            processes: Vec::new(),
            vmm: Some(path),
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The processes that may write to guest memory, as of a dirty sync.

use std::collections::BTreeMap;
use std::io;

use super::TrackingError;
use crate::processes::{stat, Mapping, Process, RamFiles, StoppedProcesses};

/// A process that maps guest memory, as of a dirty sync.
#[derive(Clone, Debug)]
pub(super) struct ProcessSnapshot {
    pub(super) mappings: Vec<Mapping>,
    pub(super) parent: u32,
    pub(super) faults: u64,
    pub(super) child_faults: u64,
    /// Whether its mappings come and go, see the documentation of `soft_dirty`.
    pub(super) has_transient_mappings: bool,
}

/// Returns the processes that may write to guest memory: the stopped ones, that of the device, and children that have a memory
/// file open.
pub(super) fn take_snapshot(
    files: &RamFiles,
    stopped: &StoppedProcesses,
) -> Result<BTreeMap<Process, ProcessSnapshot>, TrackingError> {
    let device = files.device();
    let mut now = BTreeMap::new();
    for pid in stopped.processes().map(|it| it.pid).chain([device]) {
        let failed = |source| process_error(pid, "/proc/PID/stat and maps", source);
        let mappings = files.mappings(pid).map_err(failed)?;
        if let Some(stat) = stat(pid).map_err(failed)? {
            let snapshot = ProcessSnapshot {
                mappings,
                parent: stat.parent,
                faults: stat.faults,
                child_faults: stat.child_faults,
                has_transient_mappings: false,
            };
            now.insert(stat.process, snapshot);
        }
    }
    let parents: Vec<u32> = now
        .keys()
        .map(|it| it.pid)
        .filter(|it| *it != device)
        .collect();
    let children_with_memory_open = files.children_with_memory_open(&parents);
    for stat in children_with_memory_open
        .map_err(|error| TrackingError::Unavailable(format!("/proc: {error}")))?
    {
        let snapshot = ProcessSnapshot {
            mappings: Vec::new(),
            parent: stat.parent,
            faults: stat.faults,
            child_faults: stat.child_faults,
            has_transient_mappings: true,
        };
        now.insert(stat.process, snapshot);
    }
    let transient: Vec<Process> = now
        .iter()
        .filter(|(_, snapshot)| {
            let parent = now.iter().find(|(it, _)| it.pid == snapshot.parent);
            parent.is_some_and(|(it, parent)| {
                it.pid != device && parent.mappings != snapshot.mappings
            })
        })
        .map(|(process, _)| *process)
        .collect();
    for process in transient {
        if let Some(snapshot) = now.get_mut(&process) {
            snapshot.has_transient_mappings = true;
        }
    }
    Ok(now)
}

pub(super) fn process_error(pid: u32, what: &'static str, source: io::Error) -> TrackingError {
    TrackingError::Process { pid, what, source }
}

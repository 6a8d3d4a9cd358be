// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The processes that map guest memory, and how to stop them.
//!
//! The search compares the device and inode numbers in `/proc/*/maps` with those of the memory files. It misses a
//! process that this process may not examine: examining the processes of other users requires privileges. It also
//! misses mappings on a file system that reports another device in `maps` than in `stat` (btrfs, some overlays). Keep
//! guest memory in a memfd, or on tmpfs or hugetlbfs.

mod file_id;
mod maps;
mod pinning;
mod process;
mod process_handle;
mod stop;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::Path;

pub use file_id::FileId;
pub(crate) use maps::Mapping;
pub use pinning::{find_pinning, find_pinning_of, Pinning};
pub(crate) use process::{has_soft_dirty_mappings, none_if_exited, stat, Process, Stat};
pub(crate) use process_handle::ProcessHandle;
pub(crate) use stop::{StopError, StoppedProcesses};

use crate::Memory;

/// The memory files of a guest, by RAM block index, and the process of the device, which is not searched for.
#[derive(Clone, Debug)]
pub(crate) struct RamFiles {
    ids: Vec<FileId>,
    device: u32,
}

/// A process that maps guest memory.
#[derive(Clone, Debug)]
pub(crate) struct MappingProcess {
    pub(crate) process: Process,
    pub(crate) parent: u32,
    pub(crate) tracer: u32,
}

impl RamFiles {
    /// Returns the identities of the files of `memory`, which the process `device` serves.
    pub(crate) fn from_memory(memory: &Memory, device: u32) -> io::Result<Self> {
        let ids = memory.blocks().map(|(_, file)| FileId::of(file));
        let ids = ids.collect::<io::Result<_>>()?;
        Ok(Self { ids, device })
    }

    /// Returns the pid of the device's process.
    pub(crate) fn device(&self) -> u32 {
        self.device
    }

    fn block(&self, id: FileId) -> Option<usize> {
        self.ids.iter().position(|file| *file == id)
    }

    /// Returns whether the process is our own or that of the device.
    fn is_exempt(&self, pid: u32) -> bool {
        pid == self.device || pid == std::process::id()
    }

    /// Returns the shared mappings of guest memory in a process, by ascending address. Returns none if the process has
    /// exited.
    pub(crate) fn mappings(&self, pid: u32) -> io::Result<Vec<Mapping>> {
        match none_if_exited(fs::read(format!("/proc/{pid}/maps")))? {
            Some(text) => Ok(maps::parse(&text, |id| self.block(id)).collect()),
            None => Ok(Vec::new()),
        }
    }

    /// Returns every process that maps guest memory, by ascending pid, but not our own and not that of the device.
    pub(crate) fn mapping_processes(&self) -> io::Result<Vec<MappingProcess>> {
        self.mapping_processes_except(&[])
    }

    /// As [`RamFiles::mapping_processes`], without those in `known`.
    fn mapping_processes_except(&self, known: &[Process]) -> io::Result<Vec<MappingProcess>> {
        let mut mapping_processes = Vec::new();
        for pid in all_pids()? {
            let pid = pid?;
            if self.is_exempt(pid) {
                continue;
            }
            // Another process may have the same pid by now.
            if let Some(known) = known.iter().find(|it| it.pid == pid) {
                if stat(pid)?.is_none_or(|it| it.process == *known) {
                    continue;
                }
            }
            match self.mapping_process(pid) {
                Ok(mapping_process) => mapping_processes.extend(mapping_process),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(error),
            }
        }
        mapping_processes.sort_by_key(|mapping_process| mapping_process.process.pid);
        Ok(mapping_processes)
    }

    /// Returns the children of `parents` that have a memory file open but do not map it now.
    pub(crate) fn children_with_memory_open(&self, parents: &[u32]) -> io::Result<Vec<Stat>> {
        let mut children_with_memory_open = Vec::new();
        for pid in all_pids()? {
            let pid = pid?;
            let Some(stat) = stat(pid)? else {
                continue;
            };
            if !parents.contains(&stat.parent) || self.is_exempt(pid) {
                continue;
            }
            match self
                .has_memory_open(pid)
                .and_then(|open| Ok(open && !self.is_mapped_by(pid)?))
            {
                Ok(true) => children_with_memory_open.push(stat),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(error),
            }
        }
        Ok(children_with_memory_open)
    }

    /// Returns whether the process has a memory file open.
    fn has_memory_open(&self, pid: u32) -> io::Result<bool> {
        let Some(entries) = none_if_exited(fs::read_dir(format!("/proc/{pid}/fd")))? else {
            return Ok(false);
        };
        for entry in entries {
            let Some(entry) = none_if_exited(entry)? else {
                return Ok(false);
            };
            let file = none_if_exited(rustix::fs::stat(entry.path()).map_err(io::Error::from))?;
            if file.is_some_and(|file| self.block(FileId::from_stat(&file)).is_some()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns whether the process maps guest memory. Stops reading at the first such mapping, because a process may
    /// have thousands of mappings.
    fn is_mapped_by(&self, pid: u32) -> io::Result<bool> {
        let Some(file) = none_if_exited(File::open(format!("/proc/{pid}/maps")))? else {
            return Ok(false);
        };
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        while none_if_exited(reader.read_until(b'\n', &mut line))?.unwrap_or(0) > 0 {
            if maps::parse(&line, |id| self.block(id)).next().is_some() {
                return Ok(true);
            }
            line.clear();
        }
        Ok(false)
    }

    fn mapping_process(&self, pid: u32) -> io::Result<Option<MappingProcess>> {
        if !self.is_mapped_by(pid)? {
            return Ok(None);
        }
        let (Some(stat), Some(status)) = (stat(pid)?, process::status(pid)?) else {
            return Ok(None);
        };
        Ok(Some(MappingProcess {
            process: stat.process,
            parent: stat.parent,
            tracer: status.tracer,
        }))
    }
}

/// Iterates over the pids of all processes.
fn all_pids() -> io::Result<impl Iterator<Item = io::Result<u32>>> {
    pids_in(Path::new("/proc"))
}

fn pids_in(proc: &Path) -> io::Result<impl Iterator<Item = io::Result<u32>>> {
    let entries = fs::read_dir(proc)?;
    Ok(entries.filter_map(|entry| {
        let name = entry.map(|entry| entry.file_name().to_str().and_then(|it| it.parse().ok()));
        name.transpose()
    }))
}

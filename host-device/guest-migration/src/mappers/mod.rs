// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which processes map guest memory, and how they are made to stand still.
//!
//! They are found by the device and inode of the memory files in `/proc/*/maps`. A process that may not be looked at is
//! taken to map nothing: to see those of other users takes the rights to do so. So does a file system that shows another
//! device in `maps` than `stat` does (btrfs, some overlays): keep guest memory in a memfd, or on tmpfs or hugetlbfs.

mod maps;
mod process;
mod stop;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};

use rustix::fs::{fstat, major, minor};

pub(crate) use maps::Mapping;
pub(crate) use process::{fresh_mappings, gone, stat, Process, Stat};
pub(crate) use stop::{StopError, Stopped};

use crate::Memory;

/// What a file is called in `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

impl FileId {
    fn of(stat: &rustix::fs::Stat) -> Self {
        Self {
            major: major(stat.st_dev),
            minor: minor(stat.st_dev),
            inode: stat.st_ino,
        }
    }
}

/// The memory files of a guest, by the index of their block.
#[derive(Clone, Debug)]
pub(crate) struct Files(Vec<FileId>);

/// A process that maps guest memory.
#[derive(Clone, Debug)]
pub(crate) struct Mapper {
    pub(crate) process: Process,
    pub(crate) parent: u32,
    pub(crate) tracer: u32,
}

impl Files {
    /// The files of `memory`.
    pub(crate) fn of(memory: &Memory) -> io::Result<Self> {
        let ids = memory
            .blocks()
            .map(|(_, file)| Ok(FileId::of(&fstat(file)?)));
        ids.collect::<io::Result<_>>().map(Self)
    }

    fn block(&self, id: FileId) -> Option<usize> {
        self.0.iter().position(|file| *file == id)
    }

    /// Where the process maps guest memory such that others see what it writes there, by ascending address. Nothing if it
    /// is no more.
    pub(crate) fn mappings(&self, pid: u32) -> io::Result<Vec<Mapping>> {
        match gone(fs::read(format!("/proc/{pid}/maps")))? {
            Some(text) => Ok(maps::parse(&text, |id| self.block(id)).collect()),
            None => Ok(Vec::new()),
        }
    }

    /// Every process but ours that maps guest memory, by its number.
    pub(crate) fn mappers(&self) -> io::Result<Vec<Mapper>> {
        self.mappers_but(&[])
    }

    /// Every process but ours and `known` that maps guest memory, by its number.
    fn mappers_but(&self, known: &[Process]) -> io::Result<Vec<Mapper>> {
        let own = std::process::id();
        let mut mappers = Vec::new();
        for pid in processes()? {
            let pid = pid?;
            if pid == own {
                continue;
            }
            // Another may have its number by now.
            if let Some(known) = known.iter().find(|it| it.pid == pid) {
                if stat(pid)?.is_none_or(|it| it.process == *known) {
                    continue;
                }
            }
            match self.mapper(pid) {
                Ok(mapper) => mappers.extend(mapper),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(error),
            }
        }
        mappers.sort_by_key(|mapper| mapper.process.pid);
        Ok(mappers)
    }

    /// The children of `parents` that map no guest memory, but could: they have it open.
    pub(crate) fn holders(&self, parents: &[u32]) -> io::Result<Vec<Stat>> {
        let mut holders = Vec::new();
        for pid in processes()? {
            let pid = pid?;
            let Some(stat) = stat(pid)? else {
                continue;
            };
            if !parents.contains(&stat.parent) || pid == std::process::id() {
                continue;
            }
            match self
                .open_in(pid)
                .and_then(|open| Ok(open && !self.mapped_by(pid)?))
            {
                Ok(true) => holders.push(stat),
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(error),
            }
        }
        Ok(holders)
    }

    /// Whether the process has guest memory open.
    fn open_in(&self, pid: u32) -> io::Result<bool> {
        let Some(entries) = gone(fs::read_dir(format!("/proc/{pid}/fd")))? else {
            return Ok(false);
        };
        for entry in entries {
            let Some(entry) = gone(entry)? else {
                return Ok(false);
            };
            let file = gone(rustix::fs::stat(entry.path()).map_err(io::Error::from))?;
            if file.is_some_and(|file| self.block(FileId::of(&file)).is_some()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the process maps guest memory. Reads no more than it takes to see that: there may be thousands of mappings.
    fn mapped_by(&self, pid: u32) -> io::Result<bool> {
        let Some(file) = gone(File::open(format!("/proc/{pid}/maps")))? else {
            return Ok(false);
        };
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        while gone(reader.read_until(b'\n', &mut line))?.unwrap_or(0) > 0 {
            if maps::parse(&line, |id| self.block(id)).next().is_some() {
                return Ok(true);
            }
            line.clear();
        }
        Ok(false)
    }

    fn mapper(&self, pid: u32) -> io::Result<Option<Mapper>> {
        if !self.mapped_by(pid)? {
            return Ok(None);
        }
        let (Some(stat), Some(status)) = (stat(pid)?, process::status(pid)?) else {
            return Ok(None);
        };
        Ok(Some(Mapper {
            process: stat.process,
            parent: stat.parent,
            tracer: status.tracer,
        }))
    }
}

/// The numbers of all processes.
fn processes() -> io::Result<impl Iterator<Item = io::Result<u32>>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.filter_map(|entry| {
        let name = entry.map(|entry| entry.file_name().to_str().and_then(|it| it.parse().ok()));
        name.transpose()
    }))
}

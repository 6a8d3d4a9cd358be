// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Information about a process from `/proc`.

use std::fs;
use std::io;
use std::str::FromStr;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// A process, identified by its pid and its start time. The start time distinguishes it from a later process with the
/// same pid.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub(crate) struct Process {
    /// The pid.
    pub(crate) pid: u32,
    /// Start time, in clock ticks since boot.
    pub(crate) start_time: u64,
}

/// The fields of `/proc/PID/stat` that are used here.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Stat {
    pub(crate) process: Process,
    pub(crate) state: ThreadState,
    /// The pid of the parent.
    pub(crate) parent: u32,
    /// Number of page faults so far.
    pub(crate) faults: u64,
    /// Number of page faults of its children that have exited and that it has waited for.
    pub(crate) child_faults: u64,
}

/// The fields of `/proc/PID/status` that are used here.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Status {
    /// The pid of the tracer, or 0.
    pub(super) tracer: u32,
    /// Number of seccomp filters.
    pub(super) seccomp_filters: u32,
}

/// The state of a thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ThreadState {
    /// Stopped, by a signal or for its tracer.
    Stopped,
    /// Exited.
    Ended,
    /// Any other state, with its letter in `/proc/PID/stat`.
    Active(char),
}

impl ThreadState {
    fn from_letter(letter: char) -> Self {
        match letter {
            'T' | 't' => Self::Stopped,
            'Z' | 'X' | 'x' => Self::Ended,
            other => Self::Active(other),
        }
    }
}

/// Returns `None` instead of an error that states that a process or thread has exited.
pub(crate) fn none_if_exited<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Reads `/proc/PID/stat`. Returns `None` if the process has exited.
pub(crate) fn stat(pid: u32) -> io::Result<Option<Stat>> {
    let Some(text) = none_if_exited(fs::read(format!("/proc/{pid}/stat")))? else {
        return Ok(None);
    };
    let stat = parse_stat(pid, &String::from_utf8_lossy(&text));
    stat.map(Some).ok_or_else(|| malformed(pid, "stat"))
}

/// Parses `/proc/PID/stat`. The process name, in parentheses, may contain any characters.
fn parse_stat(pid: u32, text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let words: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| u64::from_str(words.get(field - 3)?).ok();
    Some(Stat {
        process: Process {
            pid,
            start_time: number(22)?,
        },
        state: ThreadState::from_letter(words.first()?.chars().next()?),
        parent: words.get(1)?.parse().ok()?,
        faults: number(10)?.wrapping_add(number(12)?),
        child_faults: number(11)?.wrapping_add(number(13)?),
    })
}

/// Reads `/proc/PID/status`. Returns `None` if the process has exited.
pub(super) fn status(pid: u32) -> io::Result<Option<Status>> {
    let Some(text) = none_if_exited(fs::read(format!("/proc/{pid}/status")))? else {
        return Ok(None);
    };
    let mut status = Status::default();
    for line in String::from_utf8_lossy(&text).lines() {
        match line.split_once(':') {
            Some(("TracerPid", number)) => {
                let number = number.trim().parse();
                status.tracer = number.map_err(|_| malformed(pid, "status"))?;
            }
            Some(("Seccomp_filters", number)) => {
                let number = number.trim().parse();
                status.seccomp_filters = number.map_err(|_| malformed(pid, "status"))?;
            }
            _ => {}
        }
    }
    Ok(Some(status))
}

/// Returns the state of a thread of the process that is not stopped, or `None` if all threads are stopped or have
/// exited.
pub(super) fn active_thread_state(pid: u32) -> io::Result<Option<char>> {
    let Some(tasks) = none_if_exited(fs::read_dir(format!("/proc/{pid}/task")))? else {
        return Ok(None);
    };
    for task in tasks {
        let Some(task) = none_if_exited(task)? else {
            return Ok(None);
        };
        let Some(text) = none_if_exited(fs::read(task.path().join("stat")))? else {
            continue;
        };
        let stat = parse_stat(pid, &String::from_utf8_lossy(&text));
        match stat.ok_or_else(|| malformed(pid, "stat"))?.state {
            ThreadState::Stopped | ThreadState::Ended => {}
            ThreadState::Active(letter) => return Ok(Some(letter)),
        }
    }
    Ok(None)
}

/// Returns the path of the program that a process runs, or an empty string if the process has exited.
pub(super) fn executable(pid: u32) -> io::Result<String> {
    let link = none_if_exited(fs::read_link(format!("/proc/{pid}/exe")))?;
    Ok(link.map_or_else(String::new, |path| path.to_string_lossy().into_owned()))
}

/// Returns whether a process maps a file whose path contains `name`.
pub(super) fn has_mapped_file(pid: u32, name: &str) -> io::Result<bool> {
    let text = none_if_exited(fs::read(format!("/proc/{pid}/maps")))?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&text).contains(name))
}

/// Returns whether a process has made a mapping since its soft-dirty bits were cleared.
pub(crate) fn has_soft_dirty_mappings(pid: u32) -> io::Result<bool> {
    let text = none_if_exited(fs::read(format!("/proc/{pid}/smaps")))?.unwrap_or_default();
    Ok(text.split(|byte| *byte == b'\n').any(|line| {
        let flags = line.strip_prefix(b"VmFlags:").unwrap_or_default();
        flags.split(|byte| *byte == b' ').any(|flag| flag == b"sd")
    }))
}

fn malformed(pid: u32, file: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("/proc/{pid}/{file} has an unknown format"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_disturb_the_numbers() {
        let text =
            "77 (a) R 1 (b) T 5 77 5 0 -1 4194560 100 200 3 4 5 6 7 8 20 0 1 0 9999 1000 50\n";
        let stat = parse_stat(77, text).unwrap();
        let process = Process {
            pid: 77,
            start_time: 9999,
        };
        assert_eq!(
            stat,
            Stat {
                process,
                state: ThreadState::Stopped,
                parent: 5,
                faults: 103,
                child_faults: 204,
            }
        );
        for wrong in ["", "77 (a)", "77 (a) S 1 2 3"] {
            assert_eq!(parse_stat(77, wrong), None);
        }
    }

    #[test]
    fn of_our_own_process_it_knows_what_the_system_says() {
        let own = std::process::id();
        let first = stat(own).unwrap().unwrap();
        assert_eq!(first.process.pid, own);
        assert!(first.faults > 0);
        assert!(matches!(
            active_thread_state(own).unwrap(),
            Some('R' | 'S' | 'D')
        ));
        assert!(executable(own).unwrap().contains("migration"));
        assert!(has_mapped_file(own, "migration").unwrap());
        assert_eq!(status(own).unwrap().unwrap().tracer, 0);
        let nobody = u32::MAX;
        assert_eq!(stat(nobody).unwrap(), None);
        assert_eq!(status(nobody).unwrap(), None);
        assert_eq!(active_thread_state(nobody).unwrap(), None);
        assert_eq!(executable(nobody).unwrap(), "");
    }
}

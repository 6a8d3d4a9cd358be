// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that access guest memory by its physical pages.
//!
//! A hole in a memory file does not free a pinned page: the device keeps the old page, and the guest gets a new one. So
//! the guest and its device no longer see the same memory. The kernel does not tell which files have pinned pages. It
//! tells which devices a process has open, and which buffers an io_uring has registered.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::file_id::FileId;
use super::maps::{self, Mapping};
use super::process::none_if_exited;
use super::{pids_in, RamFiles};

/// Devices with which a process pins its memory: VFIO groups, containers and devices, iommufd, and vhost-vDPA.
const PINNING_DEVICES: [&str; 3] = ["/dev/vfio/", "/dev/iommu", "/dev/vhost-vdpa-"];

/// What is known about pinned guest memory.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pinning {
    /// A process and the device with which it pins guest memory, for the user. `None` if no such process was found.
    pub reason: Option<String>,
    /// The pids of the processes that map guest memory and could be examined, apart from that of the device, up to
    /// [`MAX_EXAMINED`]. The last one is that of the reason, if there is one. If none could be examined, nothing is known.
    pub examined: Vec<u32>,
}

/// How long a search may take.
pub const SEARCH_TIMEOUT: Duration = Duration::from_secs(5);

/// The most pids of examined processes that are kept. User-mode Linux has a process for each process of its guest.
const MAX_EXAMINED: usize = 1024;

/// Examines the processes that map a memory file.
///
/// Takes time for each process of the host. Processes of other users are not examined without privileges.
///
/// # Errors
///
/// If `/proc` or a memory file cannot be read.
pub fn find_pinning<'a>(files: impl IntoIterator<Item = &'a File>) -> io::Result<Pinning> {
    let ids = files.into_iter().map(FileId::of);
    find_pinning_of(ids.collect::<io::Result<_>>()?, std::process::id())
}

/// Examines the processes that map a memory file, as [`find_pinning`], for the device in the process `device`.
///
/// # Errors
///
/// If `/proc` cannot be read, or the search takes more than [`SEARCH_TIMEOUT`].
pub fn find_pinning_of(ids: Vec<FileId>, device: u32) -> io::Result<Pinning> {
    find_in(
        Path::new("/proc"),
        &RamFiles { ids, device },
        SEARCH_TIMEOUT,
    )
}

fn find_in(proc: &Path, files: &RamFiles, timeout: Duration) -> io::Result<Pinning> {
    let mut pinning = Pinning::default();
    let begun = Instant::now();
    for pid in pids_in(proc)? {
        // Any user can start processes whose maps are long.
        if begun.elapsed() > timeout {
            let text =
                format!("the processes of the host could not be examined within {timeout:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        let pid = pid?;
        let process = proc.join(pid.to_string());
        let mappings = match none_if_exited(fs::read(process.join("maps"))) {
            Ok(text) => {
                let text = text.unwrap_or_default();
                let found = maps::parse(&text, |id| files.block(id));
                found.collect::<Vec<_>>()
            }
            Err(_) => continue,
        };
        if mappings.is_empty() {
            continue;
        }
        let Ok(device) = pinning_device(&process, &mappings) else {
            continue;
        };
        if device.is_some() || pid != files.device {
            // The pid of the reason must not be missing.
            pinning.examined.truncate(MAX_EXAMINED - 1);
            pinning.examined.push(pid);
        }
        if let Some(device) = device {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            pinning.reason = Some(format!(
                "process {pid} ({}) maps guest memory and has {device}",
                name.trim_end()
            ));
            return Ok(pinning);
        }
    }
    Ok(pinning)
}

/// Returns what pins the memory of a process, if something does.
fn pinning_device(process: &Path, mappings: &[Mapping]) -> io::Result<Option<String>> {
    let Some(entries) = none_if_exited(fs::read_dir(process.join("fd")))? else {
        return Ok(None);
    };
    for entry in entries {
        let Some(entry) = none_if_exited(entry)? else {
            return Ok(None);
        };
        let Some(link) = none_if_exited(fs::read_link(entry.path()))? else {
            continue;
        };
        let link = link.to_string_lossy();
        if PINNING_DEVICES.iter().any(|it| link.starts_with(it)) {
            return Ok(Some(format!("{link} open")));
        }
        if link == "anon_inode:[io_uring]" {
            let info = process.join("fdinfo").join(entry.file_name());
            let info = none_if_exited(fs::read(info))?.unwrap_or_default();
            if has_registered_buffer(&String::from_utf8_lossy(&info), mappings) {
                return Ok(Some("registered it as a buffer of an io_uring".into()));
            }
        }
    }
    Ok(None)
}

/// Returns whether a buffer of an io_uring is in one of `mappings`. The text is that of `/proc/PID/fdinfo/FD`, where each
/// buffer is a line such as `    0: 0x7f0000000000/4096` after the line `UserBufs:`.
fn has_registered_buffer(info: &str, mappings: &[Mapping]) -> bool {
    let lines = info
        .lines()
        .skip_while(|line| !line.starts_with("UserBufs:"));
    let buffers = lines.skip(1).map_while(|line| line.split_once(": "));
    buffers
        .filter_map(|(_, buffer)| {
            let (address, length) = buffer.trim().strip_prefix("0x")?.split_once('/')?;
            let start = u64::from_str_radix(address, 16).ok()?;
            Some(start..start.saturating_add(length.parse().ok()?))
        })
        .any(|buffer| {
            let mut mappings = mappings.iter();
            mappings.any(|mapping| buffer.start < mapping.end && buffer.end > mapping.start)
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const FILE: FileId = FileId {
        major: 0,
        minor: 1,
        inode: 1234,
    };

    const MAPS: &str =
        "7f0000000000-7f0000004000 rw-s 00002000 00:01 1234                       /memfd:ram (deleted)\n";

    /// Makes the files of a process: its maps, and its descriptors with what they refer to.
    fn process(proc: &Path, pid: u32, maps: &str, fds: &[&str], info: &str) {
        let process = proc.join(pid.to_string());
        fs::create_dir_all(process.join("fd")).unwrap();
        fs::create_dir_all(process.join("fdinfo")).unwrap();
        fs::write(process.join("maps"), maps).unwrap();
        fs::write(process.join("comm"), "a vmm\n").unwrap();
        for (number, target) in fds.iter().enumerate() {
            symlink(target, process.join("fd").join(number.to_string())).unwrap();
            fs::write(process.join("fdinfo").join(number.to_string()), info).unwrap();
        }
    }

    fn find(make: impl Fn(&Path)) -> Pinning {
        let proc = tempfile::tempdir().unwrap();
        make(proc.path());
        let files = RamFiles {
            ids: vec![FILE],
            device: 1,
        };
        find_in(proc.path(), &files, Duration::from_secs(600)).unwrap()
    }

    #[test]
    fn a_process_with_guest_memory_and_such_a_device_is_named() {
        for device in [
            "/dev/vfio/12",
            "/dev/vfio/devices/vfio0",
            "/dev/iommu",
            "/dev/vhost-vdpa-0",
        ] {
            let fds = ["/dev/null", device];
            let found = find(|proc| process(proc, 77, MAPS, &fds, ""));
            let expected = format!("process 77 (a vmm) maps guest memory and has {device} open");
            assert_eq!((found.reason, found.examined), (Some(expected), vec![77]));
            // A process that does not map guest memory cannot pin it.
            let found = find(|proc| process(proc, 77, "", &fds, ""));
            assert_eq!(found, Pinning::default());
        }
    }

    #[test]
    fn it_is_told_apart_whether_somebody_else_could_be_examined() {
        let found = find(|proc| process(proc, 77, MAPS, &["/dev/kvm"], ""));
        assert_eq!((found.reason, found.examined), (None, vec![77]));
        // Our own process always maps guest memory.
        let found = find(|proc| process(proc, 1, MAPS, &["/dev/kvm"], ""));
        assert!(found.examined.is_empty());
    }

    #[test]
    fn registered_buffers_of_an_io_uring_pin_what_they_contain() {
        let info = |buffer: &str| {
            format!("SqMask:\t0x1\nUserFiles:\t1\n    0: /tmp/file\nUserBufs:\t2\n    0: <none>\n    1: {buffer}\nPollList:\n  op=1\n")
        };
        let fds = ["anon_inode:[io_uring]"];
        for (buffer, pins) in [
            ("0x7f0000003000/8192", true),
            ("0x7f0000004000/8192", false),
            ("0x600000/4096", false),
        ] {
            let found = find(|proc| process(proc, 77, MAPS, &fds, &info(buffer)));
            assert_eq!(found.reason.is_some(), pins, "{buffer}");
        }
    }

    #[test]
    fn a_search_that_takes_too_long_tells_nothing() {
        let proc = tempfile::tempdir().unwrap();
        process(proc.path(), 77, MAPS, &["/dev/vfio/12"], "");
        let files = RamFiles {
            ids: vec![FILE],
            device: 1,
        };
        let error = find_in(proc.path(), &files, Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_file_that_nobody_maps_is_not_pinned() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(find_pinning([&file]).unwrap(), Pinning::default());
    }
}

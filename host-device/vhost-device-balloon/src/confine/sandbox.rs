// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sandbox: an empty, read-only root directory, and namespaces of its own.
//!
//! There is no PID namespace, because a process enters one only by starting another process. Instead the process has no
//! `/proc`, and may send no signals and trace no process: see `seccomp` and `landlock`.

use std::env;
use std::fs;

use rustix::mount::{
    mount, mount_change, unmount, MountFlags, MountPropagationFlags, UnmountFlags,
};
use rustix::process::{chroot, getegid, geteuid, pivot_root};

use super::failure::at;
use super::options::Sandbox;
use super::sys::{unshare, UnshareFlags};

/// Where the empty file system is mounted before it becomes the root. Each host has this directory, and this process needs
/// it no longer.
const MOUNT_POINT: &str = "/proc";

/// Enters the sandbox. The calling thread must be the only one.
///
/// # Errors
///
/// The step that fails, and why. The steps before it remain.
pub(super) fn enter(sandbox: Sandbox) -> Result<(), String> {
    match sandbox {
        Sandbox::None => Ok(()),
        Sandbox::Chroot => enter_empty_directory(),
        Sandbox::Namespace => enter_namespaces(),
    }
}

/// Makes an empty directory the root directory. It has no name by then, so that nothing can be created in it.
fn enter_empty_directory() -> Result<(), String> {
    let directory = tempfile::tempdir().map_err(at("empty directory"))?;
    env::set_current_dir(directory.path()).map_err(at("empty directory"))?;
    directory.close().map_err(at("empty directory"))?;
    chroot(".").map_err(at("chroot"))?;
    env::set_current_dir("/").map_err(at("chroot"))
}

fn enter_namespaces() -> Result<(), String> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    let others = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    match unshare(UnshareFlags::NEWUSER | others) {
        Ok(()) => {
            // Own ids stay the same. Files of other users have no owner in here.
            write("/proc/self/setgroups", "deny")?;
            write("/proc/self/uid_map", &format!("{user} {user} 1"))?;
            write("/proc/self/gid_map", &format!("{group} {group} 1"))?;
        }
        // A host without user namespaces permits the others to root.
        Err(error) => unshare(others).map_err(|_| format!("namespaces: {error}"))?,
    }
    let propagation = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", propagation).map_err(at("mount namespace"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount(
        "tmpfs",
        MOUNT_POINT,
        "tmpfs",
        flags,
        c"size=4k,nr_inodes=1,mode=0555",
    )
    .map_err(at("empty file system"))?;
    env::set_current_dir(MOUNT_POINT).map_err(at("empty file system"))?;
    // The old root is now mounted over the new one, and is removed.
    pivot_root(".", ".").map_err(at("root directory"))?;
    unmount(".", UnmountFlags::DETACH).map_err(at("old root directory"))?;
    env::set_current_dir("/").map_err(at("root directory"))
}

fn write(path: &'static str, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(at(path))
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs programs in the Debian root file system, with folders of the host mounted in it.
//!
//! The mounts and the processes have namespaces of their own, so nothing stays mounted or running, however the program
//! ends. Root needs no user namespace. Other users become root of one.
//!
//! A folder has a fixed path in the sandbox, whatever its path on the host. Files of a kernel tree are full of absolute
//! paths: the fixed path allows building a tree under a temporary name and renaming it when it is complete.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::geteuid;

/// The script that mounts what its arguments say below $1, and runs a command there.
const ENTER: &str = include_str!("../scripts/enter.sh");

/// A root file system, and the folders to mount in it.
pub struct Sandbox {
    rootfs: PathBuf,
    folders: Vec<OsString>,
    variables: Vec<String>,
}

impl Sandbox {
    /// Returns a sandbox in `rootfs` that shows nothing of the host but `/proc` and `/dev`.
    pub fn new(rootfs: &Path) -> Self {
        Self {
            rootfs: rootfs.to_owned(),
            folders: Vec::new(),
            variables: Vec::new(),
        }
    }

    /// Mounts the host's `folder` at `inside`, read-write.
    pub fn bind_rw(self, folder: &Path, inside: &str) -> Self {
        self.bind("rw", folder, inside)
    }

    /// Mounts the host's `folder` at `inside`, read-only where the host allows it.
    pub fn bind_ro(self, folder: &Path, inside: &str) -> Self {
        self.bind("ro", folder, inside)
    }

    fn bind(mut self, mode: &str, folder: &Path, inside: &str) -> Self {
        self.folders
            .extend([mode.into(), folder.into(), inside.into()]);
        self
    }

    /// Sets an environment variable for the script.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.variables.push(format!("{name}={value}"));
        self
    }

    /// Returns the command that runs a shell script in the sandbox, with the variables and `RUST_LIB_SRC` set.
    pub fn command(&self, script: &str) -> Command {
        let mut command = unshare(&[
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
        ]);
        command
            .args(["sh", "-c", ENTER, "enter"])
            .arg(&self.rootfs)
            .args(&self.folders)
            .arg("--");
        command.args(&self.variables).args(["sh", "-euc", script]);
        command
    }
}

/// Returns an `unshare` command, with a user namespace unless the user is root.
pub fn unshare(arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    if !geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(arguments);
    command
}

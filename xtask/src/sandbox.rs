// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs programs in the Debian root file system, with folders of the host in it.
//!
//! A mount namespace of its own holds the mounts and a process namespace the processes, so that nothing is left mounted or
//! running, however it ends. Root needs no more; others become root of a user namespace.
//!
//! A folder is always seen at the same path inside, whatever it is called outside. That is why a kernel tree, whose
//! files are full of absolute paths, can be built under a temporary name and renamed when it is done.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::geteuid;

/// Mounts what its arguments say below $1, then runs a script in there.
const ENTER: &str = include_str!("../scripts/enter.sh");

/// A root file system and the folders that are to be seen in it.
pub struct Sandbox {
    rootfs: PathBuf,
    folders: Vec<OsString>,
    variables: Vec<String>,
}

impl Sandbox {
    /// In `rootfs`, with nothing of the host but `/proc` and `/dev`.
    pub fn new(rootfs: &Path) -> Self {
        Self {
            rootfs: rootfs.to_owned(),
            folders: Vec::new(),
            variables: Vec::new(),
        }
    }

    /// Shows `folder` of the host at `inside`, where it may be written to.
    pub fn bind_rw(self, folder: &Path, inside: &str) -> Self {
        self.bind("rw", folder, inside)
    }

    /// Shows `folder` of the host at `inside`, where it may only be read.
    pub fn bind_ro(self, folder: &Path, inside: &str) -> Self {
        self.bind("ro", folder, inside)
    }

    fn bind(mut self, mode: &str, folder: &Path, inside: &str) -> Self {
        self.folders
            .extend([mode.into(), folder.into(), inside.into()]);
        self
    }

    /// Sets a variable for the script.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.variables.push(format!("{name}={value}"));
        self
    }

    /// The command that runs a shell script in there. It starts with the variables and with `RUST_LIB_SRC` set.
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

/// `unshare`, as root of a user namespace if need be.
pub fn unshare(arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    if !geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(arguments);
    command
}

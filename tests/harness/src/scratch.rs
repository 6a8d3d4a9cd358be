// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Temporary folders for the sockets and files of a test.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use tempfile::TempDir;

const PREFIX: &str = "vballoon-";

/// A temporary folder, removed with its contents on drop.
///
/// The folder's name contains the process id. A killed process cannot remove its folder, so the next [`Scratch::new`]
/// does.
#[derive(Debug)]
pub struct Scratch(TempDir);

impl Scratch {
    /// Creates a folder in the system's temporary folder.
    ///
    /// # Errors
    ///
    /// Fails if the folder cannot be created.
    pub fn new() -> Result<Self> {
        let parent = std::env::temp_dir();
        remove_stale(&parent);
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir_in(&parent);
        folder
            .map(Self)
            .with_context(|| format!("cannot make a folder in {}", parent.display()))
    }

    /// Returns the path of `name` in the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Lists the names in the folder, sorted.
    ///
    /// # Errors
    ///
    /// Fails if the folder cannot be listed.
    pub fn contents(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(self.0.path()).context("cannot list the scratch folder")?;
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}

/// Removes the folders of processes that have ended. Ignores errors: a folder that cannot be removed belongs to another
/// user.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX))
            .and_then(|rest| rest.split('-').next());
        let Some(owner) = owner.and_then(|number| number.parse().ok()) else {
            continue;
        };
        if kill(Pid::from_raw(owner), None) == Err(Errno::ESRCH) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_its_handle_and_a_dead_process_loses_its_own() {
        let dead = std::env::temp_dir().join(format!("{PREFIX}{}-dead", i32::MAX));
        fs::create_dir_all(dead.join("deep")).unwrap();
        let scratch = Scratch::new().unwrap();
        assert!(!dead.exists());
        let path = scratch.path("file");
        fs::write(&path, "text").unwrap();
        assert_eq!(scratch.contents().unwrap(), ["file"]);
        drop(scratch);
        assert!(!path.exists());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Folders that are made once. Each is built under a temporary name and renamed when it is complete, so a folder with
//! its final name is complete even after an interrupted set-up.
//!
//! A stamp in each folder is the hash of its recipe and of the stamps of its inputs. If a recipe changes, its folder
//! and those that depend on it are rebuilt.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::progress::say;

const STAMP: &str = ".stamp";
const BUILDING: &str = ".building-";
const OUTDATED: &str = ".outdated-";

/// The folder of all entries, locked against concurrent set-ups.
pub struct Cache {
    root: PathBuf,
    _lock: Flock<File>,
}

/// A folder to make.
pub struct Step<'a> {
    /// The folder's name, which is also the step's name in messages.
    pub name: &'a str,
    /// The description in progress messages.
    pub description: &'a str,
    /// The folders that it is made from.
    pub inputs: &'a [&'a CacheEntry],
    /// Everything else that determines the result: scripts, names, versions.
    pub recipe: &'a [&'a str],
}

/// A complete folder.
pub struct CacheEntry {
    /// The path of the folder.
    pub path: PathBuf,
    stamp: String,
}

impl Cache {
    /// Locks the cache, waiting for another set-up to end, and removes what interrupted set-ups have left.
    pub fn open(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        let path = root.join("lock");
        let file =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((file, Errno::EWOULDBLOCK)) => {
                say("another set-up is running: waiting for it");
                Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)
            }
            Err((_, error)) => Err(error),
        };
        let lock = lock.with_context(|| format!("cannot lock {}", path.display()))?;
        let cache = Self { root, _lock: lock };
        cache.remove_leftovers()?;
        Ok(cache)
    }

    /// Returns the path of the log file of a step.
    pub fn log(&self, step: &str) -> PathBuf {
        self.root.join("logs").join(format!("{step}.log"))
    }

    /// Returns the step's folder. If it is missing or has another stamp, `make` builds it. `make` gets a folder with a
    /// temporary name, and the path of the log file.
    pub fn ensure(
        &self,
        step: &Step<'_>,
        make: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<CacheEntry> {
        let entry = CacheEntry {
            path: self.root.join(step.name),
            stamp: stamp(step),
        };
        if entry.is_whole() {
            return Ok(entry);
        }
        say(format_args!("{}: {}", step.name, step.description));
        let start = Instant::now();
        let building = self.root.join(format!("{BUILDING}{}", step.name));
        fs::create_dir(&building).with_context(|| format!("cannot make {}", building.display()))?;
        make(&building, &self.log(step.name))
            .with_context(|| format!("set-up of {}", step.name))?;
        fs::write(building.join(STAMP), &entry.stamp).context("cannot write a stamp")?;
        let outdated = self.root.join(format!("{OUTDATED}{}", step.name));
        match fs::rename(&entry.path, &outdated) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error)
                    .with_context(|| format!("cannot move {} away", entry.path.display()));
            }
            _ => {}
        }
        fs::rename(&building, &entry.path)
            .with_context(|| format!("cannot rename {}", building.display()))?;
        remove(&outdated)?;
        say(format_args!(
            "{}: done in {} s",
            step.name,
            start.elapsed().as_secs()
        ));
        Ok(entry)
    }

    /// Removes all folders. The lock file stays, and stays locked.
    pub fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.root).context("cannot list the cache")? {
            let path = entry?.path();
            if path.is_dir() {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn remove_leftovers(&self) -> Result<()> {
        for entry in fs::read_dir(&self.root).context("cannot list the cache")? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(BUILDING) || name.starts_with(OUTDATED) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

impl CacheEntry {
    fn is_whole(&self) -> bool {
        fs::read_to_string(self.path.join(STAMP)).is_ok_and(|stamp| stamp == self.stamp)
    }
}

fn stamp(step: &Step<'_>) -> String {
    let mut hash = Sha256::new();
    for part in step
        .inputs
        .iter()
        .map(|entry| entry.stamp.as_str())
        .chain(step.recipe.iter().copied())
    {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

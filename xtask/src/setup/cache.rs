// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Folders that are made once: each is built under a temporary name and renamed when it is whole, so that a name that is
//! there means that the thing is there, whenever the last set-up was interrupted.
//!
//! A stamp in each folder is the hash of the recipe that made it and of the stamps of what it was made from: if a recipe
//! changes, its folder and those that depend on it are made anew.

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

/// The folder of all of them, locked against a second set-up.
pub struct Cache {
    root: PathBuf,
    _lock: Flock<File>,
}

/// One folder to be made.
pub struct Step<'a> {
    /// The folder's name, and the step's in messages.
    pub name: &'a str,
    /// What it is, for the person who waits.
    pub description: &'a str,
    /// The stamps of what it is made from.
    pub inputs: &'a [&'a CacheEntry],
    /// All that decides what comes out: scripts, names, versions.
    pub recipe: &'a [&'a str],
}

/// A folder that is whole.
pub struct CacheEntry {
    /// Where it lies.
    pub path: PathBuf,
    stamp: String,
}

impl Cache {
    /// Locks the cache, waiting for another set-up to end, and clears away what interrupted ones have left.
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

    /// The log file of a step.
    pub fn log(&self, step: &str) -> PathBuf {
        self.root.join("logs").join(format!("{step}.log"))
    }

    /// Returns the step's folder, made by `make` in a folder of another name if it is not there or not of this recipe.
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

    /// Removes everything but the lock, which is held.
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

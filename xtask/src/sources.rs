// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the Rust sources of the repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const ROOTS: [&str; 6] = [
    "fuzz",
    "guest-driver",
    "host-device",
    "shared-abi",
    "tests",
    "xtask",
];

/// A source file.
pub struct Source {
    /// The path in the repository.
    pub name: String,
    /// The contents.
    pub text: String,
}

/// Reads all Rust sources of the repository.
///
/// # Errors
///
/// Fails if a file or folder cannot be read.
pub fn read_all(repository: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for root in ROOTS {
        for file in files(&repository.join(root))? {
            let text = fs::read_to_string(&file)
                .with_context(|| format!("cannot read {}", file.display()))?;
            let name = file.strip_prefix(repository).unwrap_or(&file);
            let name = name.to_string_lossy().into_owned();
            sources.push(Source { name, text });
        }
    }
    Ok(sources)
}

/// Returns the names of all files that people wrote, in the order of their names: without the build folder and hidden files.
///
/// # Errors
///
/// If a folder cannot be listed.
pub fn names(repository: &Path) -> Result<Vec<String>> {
    const BUILT: &str = "target";

    let mut found = Vec::new();
    let mut folders = vec![repository.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?
        {
            let path = entry?.path();
            let name = path.strip_prefix(repository).unwrap_or(&path);
            let name = name.to_string_lossy().into_owned();
            if name == BUILT || name.starts_with('.') {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let path = entry?.path();
        if path.is_dir() {
            found.append(&mut files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(found)
}

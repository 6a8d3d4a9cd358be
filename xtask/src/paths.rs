// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The paths of the repository and the cache.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Returns the root of the repository.
pub fn repository() -> Result<PathBuf> {
    // Cargo sets the variable when it runs this program. Without cargo the path from compile time is used.
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    manifest
        .parent()
        .map(Path::to_owned)
        .context("xtask does not lie in a repository")
}

/// Returns the folder of everything that is set up once.
pub fn cache() -> Result<PathBuf> {
    let folder = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => {
            PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
                .join(".cache")
        }
    };
    Ok(folder.join("virtio-balloon-rs"))
}

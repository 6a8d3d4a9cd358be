// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Paths that other programs open. Their working directory is not that of this program.

use std::path::{self, Path, PathBuf};

use crate::error::CommandError;

/// Returns an absolute path.
///
/// # Errors
///
/// If the working directory is unknown, or the path is empty.
pub fn absolute(path: &Path) -> Result<PathBuf, CommandError> {
    path::absolute(path).map_err(|error| {
        CommandError::Io(format!("'{}' is not a usable path", path.display()), error)
    })
}

/// Returns a URI with an absolute path if it is `unix:PATH` or `file:PATH`, and any other URI as it is.
///
/// # Errors
///
/// As [`absolute`], or if the working directory is not UTF-8, which QMP requires.
pub fn absolute_uri(uri: &str) -> Result<String, CommandError> {
    let (kind, path) = match uri.split_once(':') {
        Some((kind @ ("unix" | "file"), path)) if !path.is_empty() => (kind, path),
        _ => return Ok(uri.to_owned()),
    };
    let path = absolute(Path::new(path))?;
    let text = path.to_str().ok_or_else(|| {
        let text = format!("{} is not UTF-8: use another directory", path.display());
        CommandError::Usage(text)
    })?;
    Ok(format!("{kind}:{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_uris_are_absolute() {
        let here = std::env::current_dir().unwrap();
        for (uri, path) in [("file:a/b", "a/b"), ("unix:s", "s"), ("file:./x", "x")] {
            let (kind, _) = uri.split_once(':').unwrap();
            let expected = format!("{kind}:{}", here.join(path).display());
            assert_eq!(absolute_uri(uri).unwrap(), expected);
        }
        for uri in [
            "file:/a",
            "unix:/s",
            "tcp:host:1",
            "fd:3",
            "exec:cat",
            "file:",
            "unix",
        ] {
            assert_eq!(absolute_uri(uri).unwrap(), uri);
        }
    }
}

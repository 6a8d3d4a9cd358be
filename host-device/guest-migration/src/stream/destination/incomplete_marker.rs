// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The marker beside an incomplete memory file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation, SeekFrom};
use rustix::io::Errno;

use super::Destination;
use crate::stream::destination_error::DestinationError;

/// The marker `PATH.incomplete`, locked by this receiver.
#[derive(Debug)]
pub(super) struct IncompleteMarker {
    path: PathBuf,
    file: File,
}

impl IncompleteMarker {
    pub(super) fn create(memory: &Path) -> Result<Self, DestinationError> {
        let path = Destination::marker(memory);
        let error = |doing| {
            let path = path.clone();
            move |source: io::Error| DestinationError::Io {
                path,
                doing,
                source,
            }
        };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(error("cannot create the incomplete marker"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(DestinationError::Busy(memory.to_owned())),
            Err(other) => return Err(error("cannot lock the incomplete marker")(other.into())),
        }
        let marker = Self { path, file };
        marker
            .write_reason("the migration is in progress")
            .map_err(|source| DestinationError::Io {
                path: marker.path.clone(),
                doing: "cannot write the incomplete marker",
                source,
            })?;
        Ok(marker)
    }

    pub(super) fn write_reason(&self, why: &str) -> io::Result<()> {
        let mut file = if self.path.exists() {
            self.file.try_clone()?
        } else {
            File::create(&self.path)?
        };
        file.set_len(0)?;
        rustix::fs::seek(&file, SeekFrom::Start(0))?;
        writeln!(
            file,
            "The memory file beside this marker is incomplete: {why}."
        )
    }

    pub(super) fn remove(&self) -> Result<(), DestinationError> {
        fs::remove_file(&self.path).map_err(|source| DestinationError::Io {
            path: self.path.clone(),
            doing: "memory file is complete, but its incomplete marker cannot be removed",
            source,
        })
    }
}

impl Drop for IncompleteMarker {
    /// Unlocks the marker. Closing the file does not unlock it as long as a process that another thread is just
    /// starting has a copy of the descriptor.
    fn drop(&mut self) {
        // On an error, the lock ends with the last copy.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_the_descriptor_does_not_keep_the_marker_locked() {
        let folder = tempfile::tempdir().unwrap();
        let memory = folder.path().join("ram");
        let marker = IncompleteMarker::create(&memory).unwrap();
        let copy = marker.file.try_clone().unwrap();
        let busy = IncompleteMarker::create(&memory);
        assert!(matches!(busy, Err(DestinationError::Busy(_))), "{busy:?}");
        drop(marker);
        IncompleteMarker::create(&memory).unwrap();
        drop(copy);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A workload that continuously writes, changes, compares and removes files of the guest's tmpfs, as page cache load.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use guest_agent::calls::{ChurnFiles, ChurnStats};
use guest_agent::pattern::{self, PAGE};

use crate::job::{Job, Rng};

/// The size range of a file, in pages.
const PAGES_MIN: usize = 1;
const PAGES_MAX: usize = 512;

/// A file and its expected contents.
struct ChurnedFile {
    path: PathBuf,
    file: File,
    /// The seed of each page. The seeds are in anonymous memory: if a page of the file is lost or exchanged, its seed
    /// survives and shows the difference.
    seeds: Vec<u64>,
}

/// The files of the workload.
pub struct FileChurn {
    folder: PathBuf,
    churned: Vec<ChurnedFile>,
    pages: usize,
    max_pages: usize,
    last: u64,
    random: Rng,
    page: Vec<u8>,
    stats: ChurnStats,
}

impl FileChurn {
    /// Creates the folder of the files. There are no files yet.
    pub fn new(churn: &ChurnFiles) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("churn-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self {
            folder,
            churned: Vec::new(),
            pages: 0,
            max_pages: usize::try_from(churn.bytes)? / PAGE,
            last: 0,
            random: Rng(churn.seed),
            page: vec![0; PAGE],
            stats: ChurnStats::default(),
        })
    }

    fn write(&mut self) -> Result<()> {
        let pages = PAGES_MIN + self.random.below(PAGES_MAX - PAGES_MIN + 1);
        if self.pages + pages > self.max_pages {
            for _ in 0..=self.random.below(self.churned.len()) {
                self.remove()?;
            }
            return Ok(());
        }
        self.last += 1;
        let path = self.folder.join(self.last.to_string());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        let mut churned = ChurnedFile {
            path,
            file,
            seeds: Vec::with_capacity(pages),
        };
        for number in 0..pages {
            churned.seeds.push(self.random.next());
            self.write_page(&churned, number)?;
        }
        self.pages += pages;
        self.stats.pieces += 1;
        self.churned.push(churned);
        Ok(())
    }

    fn write_page(&mut self, churned: &ChurnedFile, number: usize) -> Result<()> {
        let seed = churned
            .seeds
            .get(number)
            .context("a page beyond the file")?;
        pattern::write(&mut self.page, *seed, number as u64);
        let place = (number * PAGE) as u64;
        churned
            .file
            .write_all_at(&self.page, place)
            .with_context(|| format!("cannot write {}", churned.path.display()))?;
        self.stats.bytes += PAGE as u64;
        Ok(())
    }

    fn compare(&mut self, churned: &ChurnedFile) -> Result<()> {
        for (number, seed) in churned.seeds.iter().enumerate() {
            churned
                .file
                .read_exact_at(&mut self.page, (number * PAGE) as u64)
                .with_context(|| format!("cannot read {}", churned.path.display()))?;
            self.stats.compared += 1;
            if !pattern::holds(&self.page, *seed, number as u64) {
                self.stats.wrong += 1;
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Option<ChurnedFile> {
        let index = self.random.below(self.churned.len());
        (!self.churned.is_empty()).then(|| self.churned.swap_remove(index))
    }

    /// Overwrites some pages of a file. Truncates the file in one of four cases.
    fn change(&mut self) -> Result<()> {
        let Some(mut churned) = self.take() else {
            return Ok(());
        };
        for _ in 0..self.random.below(32) {
            let number = self.random.below(churned.seeds.len());
            let seed = self.random.next();
            if let Some(place) = churned.seeds.get_mut(number) {
                *place = seed;
                self.write_page(&churned, number)?;
            }
        }
        if self.random.below(4) == 0 {
            let left = self.random.below(churned.seeds.len());
            self.pages -= churned.seeds.len() - left;
            churned.seeds.truncate(left);
            churned
                .file
                .set_len((left * PAGE) as u64)
                .with_context(|| format!("cannot cut {}", churned.path.display()))?;
        }
        self.churned.push(churned);
        Ok(())
    }

    /// Compares a file, then removes it.
    fn remove(&mut self) -> Result<()> {
        let Some(churned) = self.take() else {
            return Ok(());
        };
        self.compare(&churned)?;
        self.pages -= churned.seeds.len();
        fs::remove_file(&churned.path)
            .with_context(|| format!("cannot remove {}", churned.path.display()))
    }

    /// Compares a file.
    fn verify_one(&mut self) -> Result<()> {
        if let Some(churned) = self.take() {
            self.compare(&churned)?;
            self.churned.push(churned);
        }
        Ok(())
    }
}

impl Job for FileChurn {
    fn step(&mut self) -> Result<()> {
        match self.random.below(4) {
            0 | 1 => self.write(),
            2 => self.change(),
            _ => self.verify_one(),
        }
    }

    fn finish(&mut self) -> Result<()> {
        while !self.churned.is_empty() {
            self.remove()?;
        }
        fs::remove_dir(&self.folder)
            .with_context(|| format!("cannot remove {}", self.folder.display()))
    }

    fn stats(&self) -> &ChurnStats {
        &self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_changed_compared_and_gone_in_the_end() {
        let churn = ChurnFiles {
            bytes: 8 << 20,
            seed: 3,
            rest: 0,
        };
        let mut files = FileChurn::new(&churn).unwrap();
        for _ in 0..60 {
            files.step().unwrap();
            assert!(files.pages <= files.max_pages);
            let all: usize = files
                .churned
                .iter()
                .map(|churned| churned.seeds.len())
                .sum();
            assert_eq!(all, files.pages);
        }
        // Corrupt one byte behind the workload's back.
        let churned = files
            .churned
            .iter()
            .find(|churned| !churned.seeds.is_empty())
            .unwrap();
        let mut byte = [0];
        churned.file.read_exact_at(&mut byte, 77).unwrap();
        churned.file.write_all_at(&[byte[0] ^ 1], 77).unwrap();
        files.finish().unwrap();
        assert!(files.stats.pieces > 5 && files.stats.compared > 100);
        assert_eq!(files.stats.wrong, 1);
        assert!(!files.folder.exists());
    }
}

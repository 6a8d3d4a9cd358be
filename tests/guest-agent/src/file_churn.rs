// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Files of the guest's tmpfs that never stand still: the page cache's share of a busy guest.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use guest_agent::calls::{ChurnFiles, Churned};
use guest_agent::pattern::{self, PAGE};

use crate::job::{Job, Random};

/// Pages of a file: at least and at most.
const PAGES_MIN: usize = 1;
const PAGES_MAX: usize = 512;

/// A file, and what must be in it.
struct Kept {
    path: PathBuf,
    file: File,
    /// The seed of each page. It is kept here, in anonymous memory, so that a page of the file that was lost or exchanged
    /// does not take with it what shows that.
    seeds: Vec<u64>,
}

/// The files that there are.
pub struct Files {
    folder: PathBuf,
    kept: Vec<Kept>,
    pages: usize,
    limit: usize,
    last: u64,
    random: Random,
    page: Vec<u8>,
    done: Churned,
}

impl Files {
    /// None yet.
    pub fn new(churn: &ChurnFiles) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("churn-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self {
            folder,
            kept: Vec::new(),
            pages: 0,
            limit: usize::try_from(churn.bytes)? / PAGE,
            last: 0,
            random: Random(churn.seed),
            page: vec![0; PAGE],
            done: Churned::default(),
        })
    }

    fn write(&mut self) -> Result<()> {
        let pages = PAGES_MIN + self.random.below(PAGES_MAX - PAGES_MIN + 1);
        if self.pages + pages > self.limit {
            for _ in 0..=self.random.below(self.kept.len()) {
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
        let mut kept = Kept {
            path,
            file,
            seeds: Vec::with_capacity(pages),
        };
        for number in 0..pages {
            kept.seeds.push(self.random.next());
            self.write_page(&kept, number)?;
        }
        self.pages += pages;
        self.done.pieces += 1;
        self.kept.push(kept);
        Ok(())
    }

    fn write_page(&mut self, kept: &Kept, number: usize) -> Result<()> {
        let seed = kept.seeds.get(number).context("a page beyond the file")?;
        pattern::write(&mut self.page, *seed, number as u64);
        let place = (number * PAGE) as u64;
        kept.file
            .write_all_at(&self.page, place)
            .with_context(|| format!("cannot write {}", kept.path.display()))?;
        self.done.bytes += PAGE as u64;
        Ok(())
    }

    fn compare(&mut self, kept: &Kept) -> Result<()> {
        for (number, seed) in kept.seeds.iter().enumerate() {
            kept.file
                .read_exact_at(&mut self.page, (number * PAGE) as u64)
                .with_context(|| format!("cannot read {}", kept.path.display()))?;
            self.done.compared += 1;
            if !pattern::holds(&self.page, *seed, number as u64) {
                self.done.wrong += 1;
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Option<Kept> {
        let index = self.random.below(self.kept.len());
        (!self.kept.is_empty()).then(|| self.kept.swap_remove(index))
    }

    /// Writes some pages of a file anew, and cuts off its end now and then.
    fn change(&mut self) -> Result<()> {
        let Some(mut kept) = self.take() else {
            return Ok(());
        };
        for _ in 0..self.random.below(32) {
            let number = self.random.below(kept.seeds.len());
            let seed = self.random.next();
            if let Some(place) = kept.seeds.get_mut(number) {
                *place = seed;
                self.write_page(&kept, number)?;
            }
        }
        if self.random.below(4) == 0 {
            let left = self.random.below(kept.seeds.len());
            self.pages -= kept.seeds.len() - left;
            kept.seeds.truncate(left);
            kept.file
                .set_len((left * PAGE) as u64)
                .with_context(|| format!("cannot cut {}", kept.path.display()))?;
        }
        self.kept.push(kept);
        Ok(())
    }

    /// Compares a file and removes it.
    fn remove(&mut self) -> Result<()> {
        let Some(kept) = self.take() else {
            return Ok(());
        };
        self.compare(&kept)?;
        self.pages -= kept.seeds.len();
        fs::remove_file(&kept.path)
            .with_context(|| format!("cannot remove {}", kept.path.display()))
    }

    /// Compares a file, and keeps it.
    fn look(&mut self) -> Result<()> {
        if let Some(kept) = self.take() {
            self.compare(&kept)?;
            self.kept.push(kept);
        }
        Ok(())
    }
}

impl Job for Files {
    fn step(&mut self) -> Result<()> {
        match self.random.below(4) {
            0 | 1 => self.write(),
            2 => self.change(),
            _ => self.look(),
        }
    }

    fn finish(&mut self) -> Result<()> {
        while !self.kept.is_empty() {
            self.remove()?;
        }
        fs::remove_dir(&self.folder)
            .with_context(|| format!("cannot remove {}", self.folder.display()))
    }

    fn done(&self) -> &Churned {
        &self.done
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
        };
        let mut files = Files::new(&churn).unwrap();
        for _ in 0..60 {
            files.step().unwrap();
            assert!(files.pages <= files.limit);
            let all: usize = files.kept.iter().map(|kept| kept.seeds.len()).sum();
            assert_eq!(all, files.pages);
        }
        // One byte that nobody was to write.
        let kept = files
            .kept
            .iter()
            .find(|kept| !kept.seeds.is_empty())
            .unwrap();
        let mut byte = [0];
        kept.file.read_exact_at(&mut byte, 77).unwrap();
        kept.file.write_all_at(&[byte[0] ^ 1], 77).unwrap();
        files.finish().unwrap();
        assert!(files.done.pieces > 5 && files.done.compared > 100);
        assert_eq!(files.done.wrong, 1);
        assert!(!files.folder.exists());
    }
}

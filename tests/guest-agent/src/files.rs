// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls about files, modules and KUnit results.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};
use guest_agent::calls::{
    KunitResults, ListFolder, LoadModule, Modules, ReadFile, UnloadModule, WriteFile,
};
use nix::kmod::{delete_module, finit_module, DeleteModuleFlags, ModuleInitFlags};

use crate::serve::HandleCall;

impl HandleCall for ReadFile {
    fn handle(self) -> Result<String> {
        fs::read_to_string(&self.path).with_context(|| format!("cannot read {}", self.path))
    }
}

impl HandleCall for ListFolder {
    fn handle(self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot list {}", self.path));
            }
        };
        let name = |entry: io::Result<fs::DirEntry>| {
            let name = entry?.file_name();
            Ok(name.to_string_lossy().into_owned())
        };
        let mut names: Vec<String> = entries
            .map(name)
            .collect::<io::Result<_>>()
            .with_context(|| format!("cannot list {}", self.path))?;
        names.sort_unstable();
        Ok(names)
    }
}

impl HandleCall for WriteFile {
    fn handle(self) -> Result<()> {
        let open = || OpenOptions::new().write(true).open(&self.path);
        open()
            .and_then(|mut file| file.write_all(self.text.as_bytes()))
            .with_context(|| format!("cannot write {:?} to {}", self.text, self.path))
    }
}

impl HandleCall for LoadModule {
    fn handle(self) -> Result<()> {
        let file = File::open(&self.path).with_context(|| format!("cannot open {}", self.path))?;
        let parameters =
            CString::new(self.parameters).context("module parameters hold a NUL byte")?;
        finit_module(&file, &parameters, ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {}", self.path))
    }
}

impl HandleCall for UnloadModule {
    fn handle(self) -> Result<()> {
        let name =
            CString::new(self.name.as_str()).context("the module's name holds a NUL byte")?;
        delete_module(&name, DeleteModuleFlags::O_NONBLOCK)
            .with_context(|| format!("cannot unload {}", self.name))
    }
}

impl HandleCall for Modules {
    fn handle(self) -> Result<Vec<String>> {
        let text = fs::read_to_string("/proc/modules").context("cannot read /proc/modules")?;
        Ok(text
            .lines()
            .filter_map(|line| line.split(' ').next())
            .map(str::to_owned)
            .collect())
    }
}

impl HandleCall for KunitResults {
    fn handle(self) -> Result<BTreeMap<String, String>> {
        let folder = Path::new("/sys/kernel/debug/kunit");
        let suites = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            suites => suites.with_context(|| format!("cannot list {}", folder.display()))?,
        };
        suites
            .map(|suite| {
                let suite = suite?;
                let results = fs::read_to_string(suite.path().join("results"))?;
                Ok((suite.file_name().to_string_lossy().into_owned(), results))
            })
            .collect()
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls in which one of the kernel's memory allocations fails.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use guest_agent::calls::{FailNthResult, LoadModuleFailNth, WriteFileFailNth};
use nix::errno::Errno;
use nix::kmod::{finit_module, ModuleInitFlags};

use crate::serve::HandleCall;

/// The `fail-nth` file of the kernel's fault injection: a countdown of the allocations of the thread that opened it.
/// The allocation that ends the countdown fails.
struct FailNth(File);

impl FailNth {
    fn open() -> Result<Self> {
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open("/proc/thread-self/fail-nth")
        };
        open()
            .map(Self)
            .context("this kernel has no fault injection")
    }

    /// Runs `action` with a failing `nth` allocation.
    ///
    /// Only the allocations of `action` count: the memory for the measurement is allocated before.
    fn run(&self, nth: u32, action: impl FnOnce() -> io::Result<()>) -> Result<FailNthResult> {
        let mut left = [0; 16];
        self.0
            .write_all_at(nth.to_string().as_bytes(), 0)
            .context("cannot set the countdown")?;
        let result = action();
        let length = self.0.read_at(&mut left, 0);
        self.0
            .write_all_at(b"0", 0)
            .context("cannot stop the countdown")?;
        let left = left
            .get(..length.context("cannot read the countdown")?)
            .unwrap_or_default();
        let left: u32 = String::from_utf8_lossy(left)
            .trim()
            .parse()
            .context("strange countdown")?;
        let error = result
            .err()
            .map(|error| error.raw_os_error().unwrap_or(Errno::EIO as i32));
        Ok(FailNthResult {
            error,
            injected: left == 0,
            allocations: nth - left,
        })
    }
}

impl HandleCall for WriteFileFailNth {
    fn handle(self) -> Result<FailNthResult> {
        let open = || OpenOptions::new().write(true).open(&self.path);
        let file = open().with_context(|| format!("cannot open {}", self.path))?;
        FailNth::open()?.run(self.nth, || file.write_all_at(self.text.as_bytes(), 0))
    }
}

impl HandleCall for LoadModuleFailNth {
    fn handle(self) -> Result<FailNthResult> {
        let file = File::open(&self.path).with_context(|| format!("cannot open {}", self.path))?;
        let parameters =
            CString::new(self.parameters).context("module parameters hold a NUL byte")?;
        FailNth::open()?.run(self.nth, || {
            finit_module(&file, &parameters, ModuleInitFlags::empty()).map_err(io::Error::from)
        })
    }
}

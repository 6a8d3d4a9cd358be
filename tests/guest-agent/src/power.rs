// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Power-off, and kexec of another kernel.

use std::ffi::CString;
use std::fs::File;
use std::process::ExitCode;

use anyhow::{Context, Result};
use guest_agent::calls::KexecLoad;
use nix::sys::reboot::{reboot, RebootMode};

use crate::serve::HandleCall;
use crate::sys::kexec_file_load;

/// Powers the guest off or starts the loaded kernel, as `mode` says. Returns only if the kernel refuses.
pub fn shut_down(mode: RebootMode) -> ExitCode {
    let Err(error) = reboot(mode);
    eprintln!("agent: {mode:?} failed: {error}");
    ExitCode::FAILURE
}

impl HandleCall for KexecLoad {
    fn handle(self) -> Result<()> {
        let open = |path| File::open(path).with_context(|| format!("cannot open {path}"));
        let (kernel, initramfs) = (open(&self.kernel)?, open(&self.initramfs)?);
        let command_line = CString::new(self.command_line).context("a NUL byte")?;
        kexec_file_load(&kernel, &initramfs, &command_line)
            .with_context(|| format!("cannot load {}", self.kernel))
    }
}

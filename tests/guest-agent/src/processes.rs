// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls that run programs in the guest or connect a shell to the console.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use guest_agent::calls::{CommandOutput, Run, Shell};

use crate::serve::HandleCall;

const BUSYBOX: &str = "/bin/busybox";

impl HandleCall for Run {
    fn handle(self) -> Result<CommandOutput> {
        let (program, arguments) = self.argv.split_first().context("no program was named")?;
        let mut command = if program.contains('/') {
            Command::new(program)
        } else {
            let mut applet = Command::new(BUSYBOX);
            applet.arg(program);
            applet
        };
        let output = command.args(arguments).stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("cannot run {program}"))?;
        Ok(CommandOutput {
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }
}

impl HandleCall for Shell {
    fn handle(self) -> Result<()> {
        let installed = Command::new(BUSYBOX)
            .args(["--install", "-s", "/bin"])
            .status();
        installed.context("cannot install the shell's commands")?;
        // /dev/console cannot be a controlling terminal. The device behind it can.
        let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
        let name = active
            .split_whitespace()
            .last()
            .unwrap_or("console")
            .to_owned();
        let terminal = Path::new("/dev").join(name);
        let open = || OpenOptions::new().read(true).write(true).open(&terminal);
        let console = open().with_context(|| format!("cannot open {}", terminal.display()))?;
        let mut shell = Command::new(BUSYBOX)
            .args(["setsid", "-c", BUSYBOX, "sh", "-i"])
            .env("PATH", "/bin")
            .env("PS1", "guest# ")
            .stdin(console.try_clone()?)
            .stdout(console.try_clone()?)
            .stderr(console)
            .spawn()
            .context("cannot start a shell")?;
        shell.wait().context("cannot wait for the shell")?;
        Ok(())
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs commands: with their output in a log file and progress messages on the terminal, with inherited output, or with
//! captured output. The commands die with this program.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use harness::process::die_with_parent;

use crate::progress::say;

const SIGN_OF_LIFE: Duration = Duration::from_secs(15);
const TAIL: usize = 30;

/// Runs a command with its output in `log`, which is kept. If the command fails, the error has the last lines.
pub fn to_log_file(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let file = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
    let errors = file.try_clone().context("cannot share the log")?;
    let start = Instant::now();
    die_with_parent(command)
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let mut next_sign = SIGN_OF_LIFE;
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for a command")? {
            break status;
        }
        if start.elapsed() > next_sign {
            next_sign += SIGN_OF_LIFE;
            let last = tail(log, 1);
            say(format_args!(
                "{what}: {} s … {}",
                start.elapsed().as_secs(),
                last.trim()
            ));
        }
        sleep(Duration::from_millis(50));
    };
    if !status.success() {
        bail!(
            "{what} failed ({status}). Its last lines:\n\n{}\n\nAll of them: {}",
            tail(log, TAIL),
            log.display()
        );
    }
    Ok(())
}

/// Runs a command with inherited output.
pub fn inherit_output(command: &mut Command) -> Result<()> {
    let status = die_with_parent(command)
        .status()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{:?} failed ({status})", command.get_program());
    }
    Ok(())
}

/// Runs a command and returns its output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = die_with_parent(command)
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).context("the output is not text")
}

/// Returns whether a program is on the path and starts.
pub fn is_available(program: &str) -> bool {
    let probe = |flag| {
        Command::new(program)
            .arg(flag)
            .stdin(Stdio::null())
            .output()
    };
    probe("--version").is_ok_and(|output| output.status.success())
}

fn tail(log: &Path, count: usize) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}

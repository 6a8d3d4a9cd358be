// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the commands of the documents.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::process::{Process, Streams};
use harness::scratch::Scratch;
use harness::HANG_TIMEOUT;

const TUTORIAL: &str = include_str!("../../docs/tutorial.md");

/// Runs the tutorial as a reader does, in one shell. The first step builds what the test has already.
#[test]
fn the_tutorials_commands_work_in_qemu() -> Result<()> {
    // If a command fails, the shell ends what it has started.
    const PRELUDE: &str =
        "set -e; trap 'jobs -p | xargs -r kill 2>/dev/null; rm -rf \"$T\"' EXIT\n";

    let artifacts = Artifacts::load()?;
    let (builds, blocks): (Vec<_>, Vec<_>) = blocks(TUTORIAL)
        .into_iter()
        .partition(|block| block.starts_with("make "));
    ensure!(builds.len() == 1 && blocks.len() > 5, "{blocks:?}");
    let scratch = Scratch::new()?;
    let repository = scratch.path("repository");
    let modules = repository.join("target/module/stock");
    fs::create_dir_all(&modules)?;
    let stock = artifacts.stock.as_ref().context("no stock kernel")?;
    let module = stock.our_driver.as_ref().context("no module")?;
    symlink(module, modules.join("virtio_balloon_rs.ko"))?;
    let cache = artifacts.rootfs.ancestors().nth(2);
    let mut command = Command::new("bash");
    command
        .args(["-c", &format!("{PRELUDE}{}", blocks.concat())])
        .current_dir(&repository)
        .env(
            "XDG_CACHE_HOME",
            cache.context("the root file system is in no cache")?,
        )
        .env(
            "PATH",
            path_with(&[&artifacts.daemon, &artifacts.balloonctl])?,
        );
    let mut shell = Process::start("the tutorial's shell", command, Streams::Collected)?;
    let status = shell.wait(HANG_TIMEOUT);
    let succeeded = status.as_ref().is_ok_and(|status| status.success());
    if !succeeded {
        shell.kill()?;
    }
    ensure!(succeeded, "{status:?}\n{}", shell.diagnostics());
    fs::remove_dir_all(&repository)?;
    ensure!(
        scratch.contents()?.is_empty(),
        "{:?} are left",
        scratch.contents()?
    );
    Ok(())
}

/// Returns the blocks of a document that are marked to be run.
fn blocks(text: &str) -> Vec<&str> {
    let starts = text.split("\n```sh run\n").skip(1);
    starts
        .filter_map(|block| Some(&block[..=block.find("\n```")?]))
        .collect()
}

/// Returns a search path that finds these programs first.
fn path_with(programs: &[&Path]) -> Result<std::ffi::OsString> {
    let folders = programs.iter().filter_map(|program| program.parent());
    let usual = env::var_os("PATH").unwrap_or_default();
    let all = folders.map(Path::to_owned).chain(env::split_paths(&usual));
    env::join_paths(all).context("a folder has a colon in its name")
}

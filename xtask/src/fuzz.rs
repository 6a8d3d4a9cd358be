// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs the fuzz targets of `fuzz/` with libFuzzer, on the stable toolchain.
//!
//! The coverage that libFuzzer needs is a pass of LLVM that every toolchain has. Sanitizers would need a nightly toolchain, and the
//! code under test is safe, but for the handler of SIGBUS in the daemon.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use clap::Args;

use crate::build;
use crate::paths;
use crate::progress::say;
use crate::run;

/// The options of `fuzz`.
#[derive(Args)]
pub struct Options {
    /// Only targets that have one of these texts in their names (default: all targets).
    names: Vec<String>,
    /// Seconds for each target.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    time: u64,
    /// Instead of fuzzing, replace the corpus in the tree by a small set of inputs with the coverage of all that were found.
    #[arg(long)]
    minimize: bool,
    /// Options of libFuzzer, or files to run instead of fuzzing.
    #[arg(last = true)]
    rest: Vec<String>,
}

/// The package of the targets.
const PACKAGE: &str = "fuzz-targets";
/// An input that takes longer, in seconds, is a hang. A busy machine is slow.
const HANG_SECONDS: u32 = 120;
/// The longest input in bytes that libFuzzer makes, if it is not the length of the longest in the corpus.
const LONGEST: u32 = 4096;
/// The flags that make LLVM count edges and trace comparisons.
const COVERAGE: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Runs the `fuzz` command.
pub fn command(options: &Options) -> Result<()> {
    let folder = paths::repository()?.join("fuzz");
    let targets = targets(&folder, &options.names)?;
    let built = build::target_folder()?.join("fuzz");
    let mut programs = Vec::new();
    for target in &targets {
        say(format_args!("building the fuzz target {target}"));
        programs.push(program(target, &built)?);
    }
    for (target, program) in targets.iter().zip(programs) {
        let target = TargetFolders {
            name: target,
            program,
            tree: &folder,
            built: &built,
        };
        match options.minimize {
            true => target.minimize(&options.rest)?,
            false => target.fuzz(options)?,
        }
    }
    Ok(())
}

/// Returns the names of the selected targets: one for each program in `fuzz_targets`.
fn targets(folder: &Path, texts: &[String]) -> Result<Vec<String>> {
    let programs = folder.join("fuzz_targets");
    let mut all = Vec::new();
    for entry in
        fs::read_dir(&programs).with_context(|| format!("cannot list {}", programs.display()))?
    {
        let path = entry?.path();
        let name = path.file_stem().context("a target without a name")?;
        all.push(name.to_string_lossy().into_owned());
    }
    all.sort();
    let known = all.join(", ");
    all.retain(|name| texts.is_empty() || texts.iter().any(|text| name.contains(text)));
    if all.is_empty() {
        bail!(
            "no fuzz target has {} in its name; there are {known}",
            texts.join(" or ")
        );
    }
    Ok(all)
}

/// Builds the program of a target, and returns its path. It has a target folder of its own, so its flags do not cause rebuilds of
/// other programs. An explicit target keeps the flags away from build scripts.
fn program(target: &str, built: &Path) -> Result<PathBuf> {
    let mut command = build::cargo()?;
    command.args(["build", "--quiet", "--profile", "fuzz"]);
    command.args(["--package", PACKAGE, "--features", "libfuzzer"]);
    command.args(["--bin", target, "--target", build::GUEST_TARGET]);
    command.arg("--target-dir").arg(built);
    command
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"));
    run::inherit_output(&mut command)?;
    Ok(built.join(build::GUEST_TARGET).join("fuzz").join(target))
}

/// The program of a target, and the folders of its inputs.
struct TargetFolders<'a> {
    name: &'a str,
    program: PathBuf,
    tree: &'a Path,
    built: &'a Path,
}

impl TargetFolders<'_> {
    /// The inputs in the tree.
    fn corpus(&self) -> PathBuf {
        self.tree.join("corpus").join(self.name)
    }

    /// The inputs that libFuzzer has found.
    fn found(&self) -> Result<PathBuf> {
        made(self.built.join("corpus").join(self.name))
    }

    fn libfuzzer(&self) -> Result<std::process::Command> {
        let mut command = std::process::Command::new(&self.program);
        command.current_dir(self.built);
        command.arg(format!("-timeout={HANG_SECONDS}"));
        command.arg("-rss_limit_mb=4096");
        let artifacts = made(self.built.join("artifacts").join(self.name))?;
        command.arg(format!("-artifact_prefix={}/", artifacts.display()));
        Ok(command)
    }

    fn fuzz(&self, options: &Options) -> Result<()> {
        let mut command = self.libfuzzer()?;
        // Files are run once each.
        let files = options
            .rest
            .iter()
            .any(|argument| !argument.starts_with('-'));
        if files {
            let repository = paths::repository()?;
            command.args(options.rest.iter().map(|argument| {
                let path = repository.join(argument);
                match path.exists() {
                    true => path.into_os_string(),
                    false => argument.into(),
                }
            }));
        } else {
            say(format_args!("fuzzing {} for {} s", self.name, options.time));
            command.arg(format!("-max_total_time={}", options.time));
            command.arg(format!("-max_len={LONGEST}"));
            command.arg("-print_final_stats=1");
            let dictionary = self.tree.join("dictionaries").join(self.name);
            if dictionary.exists() {
                command.arg(format!("-dict={}", dictionary.display()));
            }
            command.args(&options.rest);
            // New inputs are written into the first folder.
            command.arg(self.found()?).arg(made(self.corpus())?);
        }
        run::inherit_output(&mut command).with_context(|| {
            format!(
                "the fuzz target {} found a defect: keep the file that it names in fuzz/regressions/{}",
                self.name, self.name
            )
        })
    }

    fn minimize(&self, rest: &[String]) -> Result<()> {
        say(format_args!("minimizing the corpus of {}", self.name));
        let merged = self.built.join("merged").join(self.name);
        if merged.exists() {
            fs::remove_dir_all(&merged).context("cannot remove the last merged corpus")?;
        }
        let merged = made(merged)?;
        let corpus = made(self.corpus())?;
        let mut command = self.libfuzzer()?;
        command
            .args(["-set_cover_merge=1", "-use_counters=0"])
            .args(rest);
        command.arg(&merged).arg(self.found()?).arg(&corpus);
        run::inherit_output(&mut command)?;
        let inputs = files(&merged)?;
        ensure!(!inputs.is_empty(), "{} has no inputs", self.name);
        for old in files(&corpus)? {
            fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        for input in inputs {
            let name = input.file_name().context("an input without a name")?;
            fs::copy(&input, corpus.join(name)).context("cannot copy an input")?;
        }
        Ok(())
    }
}

/// Makes a folder, and returns its path.
fn made(folder: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()
}

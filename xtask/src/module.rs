// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Builds the kernel module.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use clap::{Args, ValueEnum};
use nix::fcntl::{Flock, FlockArg};

use crate::build;
use crate::paths;
use crate::progress::say;
use crate::run;
use crate::setup::{self, BuildEnv, Kernel};

/// The options of `module`.
#[derive(Args)]
pub struct Options {
    /// The kernel to build for.
    #[arg(long, default_value = "stock")]
    kernel: KernelChoice,
    /// Build with clippy's lints, into a folder of their own.
    #[arg(long)]
    clippy: bool,
    /// Check the format of the sources instead.
    #[arg(long)]
    fmt_check: bool,
    /// Build the sample driver of guest-driver/samples instead, for the stock kernel.
    #[arg(long, conflicts_with = "kernel")]
    sample: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KernelChoice {
    Stock,
    Uml,
    Debug,
    All,
}

/// Runs the `module` command.
pub fn command(options: &Options) -> Result<()> {
    let kernels = match options.kernel {
        KernelChoice::Stock => vec![Kernel::Stock],
        KernelChoice::Uml => vec![Kernel::Uml],
        KernelChoice::Debug => vec![Kernel::Debug],
        KernelChoice::All => Kernel::ALL.to_vec(),
    };
    let build_env = setup::ensure(&kernels)?;
    if options.fmt_check {
        return check_format(&build_env);
    }
    if options.sample {
        let module = sample(&build_env, options.clippy)?;
        say(format_args!("sample driver: {}", module.display()));
        return Ok(());
    }
    for kernel in kernels {
        let module = make(&build_env, kernel, options.clippy)?;
        say(format_args!(
            "{} kernel: {}",
            kernel.name(),
            module.display()
        ));
    }
    Ok(())
}

/// Builds the module for one kernel, with every warning an error, and returns its path.
pub fn make(build_env: &BuildEnv, kernel: Kernel, clippy: bool) -> Result<PathBuf> {
    make_named(build_env, kernel, kernel.name(), clippy)
}

/// Builds the module as [`make`] does, for a kernel with another name that is set up like `kernel`.
pub fn make_named(
    build_env: &BuildEnv,
    kernel: Kernel,
    name: &str,
    clippy: bool,
) -> Result<PathBuf> {
    let what = format!("module for the {name} kernel");
    let out = kbuild(build_env, kernel, (&what, name), "modules", clippy)?;
    Ok(out.join("virtio_balloon_rs.ko"))
}

/// Builds the sample driver for the stock kernel, in a folder of its own, with every warning an error, and returns its path.
pub fn sample(build_env: &BuildEnv, clippy: bool) -> Result<PathBuf> {
    const MODULE: &str = "virtio_rng_sample.ko";

    let kernel = Kernel::Stock;
    let (what, folder) = ("sample driver", format!("{}-sample", kernel.name()));
    let goal = format!("VBRS_SAMPLES=y {MODULE}");
    let out = kbuild(build_env, kernel, (what, &folder), &goal, clippy)?;
    Ok(out.join(MODULE))
}

/// Runs Kbuild for `goal`, with every warning an error, and returns the output folder: `folder` in `target/module`, with a suffix
/// for clippy. `what` is for messages.
fn kbuild(
    build_env: &BuildEnv,
    kernel: Kernel,
    (what, folder): (&str, &str),
    goal: &str,
    clippy: bool,
) -> Result<PathBuf> {
    let (suffix, with_clippy) = if clippy {
        ("-clippy", ", with clippy")
    } else {
        ("", "")
    };
    let what = format!("{what}{with_clippy}");
    let out = build::target_folder()?
        .join("module")
        .join(format!("{folder}{suffix}"));
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    // Two runs of Kbuild in one folder remove each other's files.
    let lock = out.with_extension("lock");
    let lock = File::create(&lock).with_context(|| format!("cannot make {}", lock.display()))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("cannot lock {}", out.display()))?;
    let log = out.with_extension("log");
    let mut command = build_env
        .sandbox()
        .bind_ro(build_env.tree(kernel)?, kernel.sandbox_path())
        .bind_ro(&paths::repository()?, "/repo")
        .bind_rw(&out, "/out")
        .env("TREE", kernel.sandbox_path())
        .env("ARCH", kernel.architecture())
        .env("CLIPPY", if clippy { "1" } else { "" })
        .command(&format!(
            "make -C \"$TREE\" ARCH=\"$ARCH\" CLIPPY=\"$CLIPPY\" M=/repo MO=/out -j\"$(nproc)\" {goal}"
        ));
    run::to_log_file(&what, &mut command, &log)?;
    refuse_warnings(&what, &log, &out)?;
    Ok(out)
}

/// Makes the module's documentation with rustdoc, with every warning an error, and returns its folder.
pub fn document(build_env: &BuildEnv) -> Result<PathBuf> {
    // Rustdoc takes the arguments of the compiler, which Kbuild saves, without those about its output.
    const RUSTDOC: &str = "cd /out && arguments=$(sed -n 's/^savedcmd_[^=]*:= .* rustc / /p' guest-driver/.lib.o.cmd \
        | sed 's/ --emit=[^ ]*//g; s/ --out-dir [^ ]*//; s/ --crate-type rlib//; s/ -Zbinary_dep_depinfo=y//') \
        && export RUSTC_BOOTSTRAP=1 OBJTREE=\"$TREE\" RUST_MODFILE=./virtio_balloon_rs \
        VIRTIO_BALLOON_RS_BINDINGS=/out/guest-driver/bindings/bindings_generated.rs \
        && eval \"rustdoc $arguments -Arustdoc::private_intra_doc_links --document-private-items -o /out/doc\"";

    let kernel = Kernel::Stock;
    let module = make(build_env, kernel, false)?;
    let out = module.parent().context("the module is in no folder")?;
    let what = "documentation of the module";
    let log = out.with_extension("doc.log");
    let mut command = build_env
        .sandbox()
        .bind_ro(build_env.tree(kernel)?, kernel.sandbox_path())
        .bind_ro(&paths::repository()?, "/repo")
        .bind_rw(out, "/out")
        .env("TREE", kernel.sandbox_path())
        .command(RUSTDOC);
    run::to_log_file(what, &mut command, &log)?;
    refuse_warnings(what, &log, &out.join("doc"))?;
    Ok(out.join("doc/virtio_balloon_rs"))
}

/// Fails if the log has a warning, and removes the build then: Kbuild does not fail on a warning and would not repeat
/// it.
fn refuse_warnings(what: &str, log: &Path, out: &Path) -> Result<()> {
    let text = fs::read_to_string(log).with_context(|| format!("cannot read {}", log.display()))?;
    let warned = text
        .lines()
        .any(|line| line.starts_with("warning") || line.contains(": warning:"));
    if warned {
        fs::remove_dir_all(out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    ensure!(!warned, "{what} has warnings:\n\n{text}");
    Ok(())
}

/// Checks the sources with rustfmt and the kernel's configuration for it.
pub fn check_format(build_env: &BuildEnv) -> Result<()> {
    let mut command = build_env.sandbox().bind_ro(&paths::repository()?, "/repo").command(
        "find /repo/guest-driver -name '*.rs' -exec rustfmt --check --edition 2021 --config-path /src/linux \
         --config skip_children=true {} + 2>&1 || find /repo/guest-driver -name '*.rs' -exec rustfmt --check \
         --edition 2021 --config-path /src/linux {} +",
    );
    let log = build::target_folder()?.join("module/format.log");
    run::to_log_file("rustfmt of the kernel module", &mut command, &log)
}

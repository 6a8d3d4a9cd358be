// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sets up what builds and guests need. Everything is made once and kept.

mod cache;
pub mod kernel_series;
mod rootfs;
mod tools;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::paths;
use crate::progress::say;
use crate::run;
use crate::sandbox::Sandbox;
use cache::{Cache, CacheEntry, Step};

const STOCK: &str = include_str!("../../scripts/stock.sh");
const UML: &str = include_str!("../../scripts/uml.sh");
const UML_CONFIGURATION: &str = include_str!("../../scripts/uml.config");
const DEBUG: &str = include_str!("../../scripts/debug.sh");
const DEBUG_CONFIGURATION: &str = include_str!("../../scripts/debug.config");
const ENTER: &str = include_str!("../../scripts/enter.sh");

/// A kernel that guests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    /// Debian's, for QEMU.
    Stock,
    /// User-mode Linux with KUnit.
    Uml,
    /// User-mode Linux that also watches locks, objects and memory, and can have allocations fail.
    Debug,
}

impl Kernel {
    /// All kernels.
    pub const ALL: [Self; 3] = [Self::Stock, Self::Uml, Self::Debug];

    /// Returns the kernel's name in paths and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Uml => "uml",
            Self::Debug => "debug",
        }
    }

    /// Returns the architecture as Kbuild calls it.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Stock => "x86",
            Self::Uml | Self::Debug => "um",
        }
    }

    /// Returns the path of the build tree in the sandbox.
    pub fn sandbox_path(self) -> &'static str {
        match self {
            Self::Stock => "/src/stock",
            Self::Uml | Self::Debug => "/src/uml",
        }
    }
}

/// The options of `setup`.
#[derive(Args)]
pub struct Options {
    /// Only what this kernel needs.
    #[arg(long)]
    kernel: Option<Kernel>,
    /// Remove everything instead.
    #[arg(long)]
    remove: bool,
}

/// The paths of everything that was set up.
#[derive(Clone)]
pub struct BuildEnv {
    /// The Debian root file system.
    pub rootfs: PathBuf,
    /// The kernel's source.
    pub source: PathBuf,
    /// The stock kernel's build tree.
    pub stock: Option<PathBuf>,
    /// User-mode Linux's build tree.
    pub uml: Option<PathBuf>,
    /// The debug kernel's build tree.
    pub debug: Option<PathBuf>,
}

impl BuildEnv {
    /// Returns the build tree of a kernel. Fails if the kernel was not set up.
    pub fn tree(&self, kernel: Kernel) -> Result<&PathBuf> {
        let tree = match kernel {
            Kernel::Stock => &self.stock,
            Kernel::Uml => &self.uml,
            Kernel::Debug => &self.debug,
        };
        tree.as_ref()
            .with_context(|| format!("the {} kernel was not set up", kernel.name()))
    }

    /// Returns a sandbox with the kernel's source in its place.
    pub fn sandbox(&self) -> Sandbox {
        Sandbox::new(&self.rootfs).bind_ro(&self.source, "/src/linux")
    }
}

/// Runs the `setup` command.
pub fn command(options: &Options) -> Result<()> {
    if options.remove {
        let root = paths::cache()?;
        Cache::open(root.clone())?.clear()?;
        return fs::remove_dir_all(&root)
            .with_context(|| format!("cannot remove {}", root.display()));
    }
    let kernels = options
        .kernel
        .map_or_else(|| Kernel::ALL.to_vec(), |kernel| vec![kernel]);
    let build_env = ensure(&kernels)?;
    let release = fs::read_to_string(build_env.rootfs.join("kernel/release"))
        .context("the stock kernel has no release")?;
    say(format_args!(
        "set up in {}, stock kernel {}",
        paths::cache()?.display(),
        release.trim()
    ));
    Ok(())
}

/// Sets up what these kernels need, unless that is done already.
pub fn ensure(kernels: &[Kernel]) -> Result<BuildEnv> {
    let cache = Cache::open(paths::cache()?)?;
    let rootfs = rootfs::make(&cache, &tools::find(&cache)?)?;
    let source = unpack_source(&cache, "source", &rootfs, None)?;
    let mut build_env = BuildEnv {
        rootfs: rootfs.path.clone(),
        source: source.path.clone(),
        stock: None,
        uml: None,
        debug: None,
    };
    if kernels.contains(&Kernel::Stock) {
        build_env.stock = Some(make_stock(&cache, &rootfs, &source)?.path);
    }
    if kernels.contains(&Kernel::Uml) {
        build_env.uml = Some(make_uml(&cache, &rootfs, &source, Kernel::Uml)?.path);
    }
    if kernels.contains(&Kernel::Debug) {
        build_env.debug = Some(make_uml(&cache, &rootfs, &source, Kernel::Debug)?.path);
    }
    Ok(build_env)
}

/// Unpacks the source of the kernel in `kernel`, or of the kernel in `rootfs` if that is `None`.
fn unpack_source(
    cache: &Cache,
    name: &str,
    rootfs: &CacheEntry,
    kernel: Option<&CacheEntry>,
) -> Result<CacheEntry> {
    const UNPACK: &str = "tar -C /src/linux --strip-components=1 -xf /kernel/linux-source.tar.xz";
    let step = Step {
        name,
        description: "the kernel's source, unpacked",
        inputs: &[kernel.unwrap_or(rootfs)],
        recipe: &[UNPACK],
    };
    cache.ensure(&step, |folder, log| {
        let mut sandbox = Sandbox::new(&rootfs.path).bind_rw(folder, "/src/linux");
        if let Some(kernel) = kernel {
            sandbox = sandbox.bind_ro(&kernel.path, "/kernel");
        }
        run::to_log_file("unpacking", &mut sandbox.command(UNPACK), log)
    })
}

fn make_stock(cache: &Cache, rootfs: &CacheEntry, source: &CacheEntry) -> Result<CacheEntry> {
    let step = Step {
        name: "stock",
        description: "the Rust metadata of the stock kernel, rebuilt from its source",
        inputs: &[rootfs, source],
        recipe: &[STOCK, ENTER],
    };
    cache.ensure(&step, |folder, log| {
        let sandbox = Sandbox::new(&rootfs.path).bind_ro(&source.path, "/src/linux");
        run::to_log_file(
            "make",
            &mut sandbox
                .bind_rw(folder, Kernel::Stock.sandbox_path())
                .command(STOCK),
            log,
        )
    })
}

/// Builds user-mode Linux. `kernel` is [`Kernel::Uml`] or [`Kernel::Debug`].
fn make_uml(
    cache: &Cache,
    rootfs: &CacheEntry,
    source: &CacheEntry,
    kernel: Kernel,
) -> Result<CacheEntry> {
    let (description, before, more) = if kernel == Kernel::Debug {
        let description = "user-mode Linux that watches locks, objects and memory";
        (description, DEBUG, DEBUG_CONFIGURATION)
    } else {
        ("user-mode Linux with KUnit", "", "")
    };
    let script = format!("{before}{UML}");
    let configuration = format!("{UML_CONFIGURATION}{more}");
    let step = Step {
        name: kernel.name(),
        description,
        inputs: &[rootfs, source],
        recipe: &[&script, &configuration, ENTER],
    };
    cache.ensure(&step, |folder, log| {
        fs::write(folder.join("fragment"), &configuration)
            .context("cannot write the configuration")?;
        let sandbox = Sandbox::new(&rootfs.path).bind_ro(&source.path, "/src/linux");
        run::to_log_file(
            "make",
            &mut sandbox
                .bind_rw(folder, kernel.sandbox_path())
                .command(&script),
            log,
        )
    })
}

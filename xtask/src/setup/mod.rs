// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What builds and guests need, made once and kept.

mod cache;
pub mod peers;
mod rootfs;
mod tools;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::place;
use crate::progress::say;
use crate::run;
use crate::sandbox::Sandbox;
use cache::{Cache, Made, Step};

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
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Stock, Self::Uml, Self::Debug];

    /// Its name in paths and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Uml => "uml",
            Self::Debug => "debug",
        }
    }

    /// The kernel's name of its architecture.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Stock => "x86",
            Self::Uml | Self::Debug => "um",
        }
    }

    /// Where its build tree is seen in the sandbox.
    pub fn inside(self) -> &'static str {
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

/// Where things were set up.
#[derive(Clone)]
pub struct SetUp {
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

impl SetUp {
    /// The build tree of a kernel.
    pub fn tree(&self, kernel: Kernel) -> Result<&PathBuf> {
        let tree = match kernel {
            Kernel::Stock => &self.stock,
            Kernel::Uml => &self.uml,
            Kernel::Debug => &self.debug,
        };
        tree.as_ref()
            .with_context(|| format!("the {} kernel was not set up", kernel.name()))
    }

    /// The root file system with the kernel's source in its place.
    pub fn sandbox(&self) -> Sandbox {
        Sandbox::new(&self.rootfs).readable(&self.source, "/src/linux")
    }
}

/// Does what `setup` says.
pub fn command(options: &Options) -> Result<()> {
    if options.remove {
        let root = place::cache()?;
        Cache::open(root.clone())?.clear()?;
        return fs::remove_dir_all(&root)
            .with_context(|| format!("cannot remove {}", root.display()));
    }
    let kernels = options
        .kernel
        .map_or_else(|| Kernel::ALL.to_vec(), |kernel| vec![kernel]);
    let set_up = ensure(&kernels)?;
    let release = fs::read_to_string(set_up.rootfs.join("kernel/release"))
        .context("the stock kernel has no release")?;
    say(format_args!(
        "set up in {}, stock kernel {}",
        place::cache()?.display(),
        release.trim()
    ));
    Ok(())
}

/// Makes what is missing for these kernels.
pub fn ensure(kernels: &[Kernel]) -> Result<SetUp> {
    let cache = Cache::open(place::cache()?)?;
    let rootfs = rootfs::make(&cache, &tools::find(&cache)?)?;
    let source = unpack_source(&cache, "source", &rootfs, None)?;
    let mut set_up = SetUp {
        rootfs: rootfs.path.clone(),
        source: source.path.clone(),
        stock: None,
        uml: None,
        debug: None,
    };
    if kernels.contains(&Kernel::Stock) {
        set_up.stock = Some(make_stock(&cache, &rootfs, &source)?.path);
    }
    if kernels.contains(&Kernel::Uml) {
        set_up.uml = Some(make_uml(&cache, &rootfs, &source, Kernel::Uml)?.path);
    }
    if kernels.contains(&Kernel::Debug) {
        set_up.debug = Some(make_uml(&cache, &rootfs, &source, Kernel::Debug)?.path);
    }
    Ok(set_up)
}

/// The source of the kernel whose parts are in `rootfs`, or of that in `kernel`.
fn unpack_source(cache: &Cache, name: &str, rootfs: &Made, kernel: Option<&Made>) -> Result<Made> {
    const UNPACK: &str = "tar -C /src/linux --strip-components=1 -xf /kernel/linux-source.tar.xz";
    let step = Step {
        name,
        about: "the kernel's source, unpacked",
        from: &[kernel.unwrap_or(rootfs)],
        recipe: &[UNPACK],
    };
    cache.ensure(&step, |folder, log| {
        let mut sandbox = Sandbox::new(&rootfs.path).writable(folder, "/src/linux");
        if let Some(kernel) = kernel {
            sandbox = sandbox.readable(&kernel.path, "/kernel");
        }
        run::logged("unpacking", &mut sandbox.command(UNPACK), log)
    })
}

fn make_stock(cache: &Cache, rootfs: &Made, source: &Made) -> Result<Made> {
    let step = Step {
        name: "stock",
        about: "the Rust metadata of the stock kernel, rebuilt from its source",
        from: &[rootfs, source],
        recipe: &[STOCK, ENTER],
    };
    cache.ensure(&step, |folder, log| {
        let sandbox = Sandbox::new(&rootfs.path).readable(&source.path, "/src/linux");
        run::logged(
            "make",
            &mut sandbox
                .writable(folder, Kernel::Stock.inside())
                .command(STOCK),
            log,
        )
    })
}

/// `kernel` is one of those that are user-mode Linux.
fn make_uml(cache: &Cache, rootfs: &Made, source: &Made, kernel: Kernel) -> Result<Made> {
    let (about, before, more) = if kernel == Kernel::Debug {
        let about = "user-mode Linux that watches locks, objects and memory";
        (about, DEBUG, DEBUG_CONFIGURATION)
    } else {
        ("user-mode Linux with KUnit", "", "")
    };
    let script = format!("{before}{UML}");
    let configuration = format!("{UML_CONFIGURATION}{more}");
    let step = Step {
        name: kernel.name(),
        about,
        from: &[rootfs, source],
        recipe: &[&script, &configuration, ENTER],
    };
    cache.ensure(&step, |folder, log| {
        fs::write(folder.join("fragment"), &configuration)
            .context("cannot write the configuration")?;
        let sandbox = Sandbox::new(&rootfs.path).readable(&source.path, "/src/linux");
        run::logged(
            "make",
            &mut sandbox.writable(folder, kernel.inside()).command(&script),
            log,
        )
    })
}

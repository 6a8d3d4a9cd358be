// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Debian's kernels of other series than the stock one: real clients of the device, with balloon drivers of their own, and
//! one that our driver is built for as well. And modules of the stock kernel that only some guests load.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Result};

use super::cache::{Cache, Made, Step};
use super::{rootfs, tools, unpack_source, Kernel, SetUp, ENTER, STOCK};
use crate::place;
use crate::run;
use crate::sandbox::Sandbox;

const FETCH: &str = include_str!("../../scripts/fetch-kernel.sh");
const UNCOMPRESS: &str = "find /out/modules -name '*.xz' -exec xz -d {} +";
/// What of a kernel's modules guests may load. A kernel that has one built in has no such file.
const MODULES: &str =
    "virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console \
                       virtio_balloon virtio_blk virtio_mem";
/// What the agent's line to the host needs, in the order of loading.
const FOR_THE_LINE: [&str; 6] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
];

/// A kernel of another series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Debian 12's.
    V6_1,
    /// Debian 13's.
    V6_12,
    /// The series before the stock kernel's, which our driver is built for, too.
    V7_2,
}

/// Where the parts of a kernel of another series lie.
pub struct PeerKernel {
    /// What is booted.
    pub image: PathBuf,
    /// Its modules, uncompressed.
    pub modules: PathBuf,
    /// Those of them that the agent's line to the host needs, in the order of loading.
    pub early: Vec<PathBuf>,
    /// Where our driver is built for it, if it can be.
    pub build: Option<SetUp>,
}

impl Peer {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V6_1, Self::V6_12, Self::V7_2];

    /// Its series, and its name in tests.
    pub fn series(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7_2 => "7.2",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::V7_2 => "trixie-backports",
        }
    }

    fn has_rust(self) -> bool {
        self == Self::V7_2
    }
}

/// Makes what is missing for a kernel of another series.
pub fn ensure(peer: Peer) -> Result<PeerKernel> {
    let cache = Cache::open(place::cache()?)?;
    let tools = tools::find(&cache)?;
    let rootfs = rootfs::make(&cache, &tools)?;
    let fetched = fetch(&cache, &rootfs, &tools.keys, peer)?;
    let build = if peer.has_rust() {
        Some(make_tree(&cache, &rootfs, &fetched, peer)?)
    } else {
        None
    };
    let modules = fetched.path.join("modules");
    Ok(PeerKernel {
        image: fetched.path.join("vmlinuz"),
        early: FOR_THE_LINE
            .map(|name| modules.join(format!("{name}.ko")))
            .into_iter()
            .filter(|path| path.exists())
            .collect(),
        modules,
        build,
    })
}

fn fetch(cache: &Cache, rootfs: &Made, keys: &Path, peer: Peer) -> Result<Made> {
    let name = format!("linux-{}", peer.series());
    let source = if peer.has_rust() { "1" } else { "0" };
    let about = format!(
        "Debian's kernel of series {} ({} MB to download)",
        peer.series(),
        if peer.has_rust() { 230 } else { 40 }
    );
    let step = Step {
        name: &name,
        about: &about,
        from: &[],
        recipe: &[
            FETCH,
            UNCOMPRESS,
            MODULES,
            rootfs::MIRROR,
            peer.series(),
            peer.suite(),
            source,
        ],
    };
    cache.ensure(&step, |folder, log| {
        let mut command = Command::new("sh");
        command.args(["-euc", FETCH]).env("LC_ALL", "C.UTF-8");
        command.env("FOLDER", folder).env("KEYS", keys);
        command
            .env("MIRROR", rootfs::MIRROR)
            .env("SUITE", peer.suite());
        command.env("SERIES", peer.series()).env("SOURCE", source);
        command.env("MODULES", MODULES);
        run::logged("fetching packages", &mut command, log)?;
        let sandbox = Sandbox::new(&rootfs.path).writable(folder, "/out");
        run::output(&mut sandbox.command(UNCOMPRESS))?;
        ensure!(
            folder.join("modules/virtio_balloon.ko").exists(),
            "the packages of series {} have no virtio_balloon.ko",
            peer.series()
        );
        Ok(())
    })
}

/// As for the stock kernel, from the parts of this one.
fn make_tree(cache: &Cache, rootfs: &Made, fetched: &Made, peer: Peer) -> Result<SetUp> {
    let name = format!("source-{}", peer.series());
    let source = unpack_source(cache, &name, rootfs, Some(fetched))?;
    let name = format!("stock-{}", peer.series());
    let about = format!(
        "the Rust metadata of the kernel of series {}, rebuilt from its source",
        peer.series()
    );
    let step = Step {
        name: &name,
        about: &about,
        from: &[rootfs, fetched, &source],
        recipe: &[STOCK, ENTER],
    };
    let made = cache.ensure(&step, |folder, log| {
        let sandbox = Sandbox::new(&rootfs.path)
            .readable(&fetched.path, "/kernel")
            .readable(&source.path, "/src/linux")
            .writable(folder, Kernel::Stock.inside());
        run::logged("make", &mut sandbox.command(STOCK), log)
    })?;
    Ok(SetUp {
        rootfs: rootfs.path.clone(),
        source: source.path,
        stock: Some(made.path),
        uml: None,
        debug: None,
    })
}

/// Modules of the stock kernel that only some guests load, uncompressed, in a folder.
pub fn stock_modules() -> Result<PathBuf> {
    const NAMES: &str = "virtio_blk virtio_mem";
    const TAKE: &str = "for name in $NAMES; do
        find /kernel/modules -name \"$name.ko.xz\" -exec xz -dc {} \\; >\"/out/$name.ko\"
        [ -s \"/out/$name.ko\" ] || { echo \"the stock kernel has no $name.ko\" >&2; exit 1; }
    done";
    let cache = Cache::open(place::cache()?)?;
    let rootfs = rootfs::make(&cache, &tools::find(&cache)?)?;
    let step = Step {
        name: "stock-modules",
        about: "modules of the stock kernel, uncompressed",
        from: &[&rootfs],
        recipe: &[TAKE, NAMES],
    };
    let made = cache.ensure(&step, |folder, log| {
        let sandbox = Sandbox::new(&rootfs.path).writable(folder, "/out");
        run::logged(
            "xz",
            &mut sandbox.variable("NAMES", NAMES).command(TAKE),
            log,
        )
    })?;
    Ok(made.path)
}

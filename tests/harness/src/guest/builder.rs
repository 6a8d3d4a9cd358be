// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a guest, and its start.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::{Driver, Guest, VMM_QMP_SOCKET};
use crate::artifacts::{Artifacts, Kernel};
use crate::check::MemoryUsage;
use crate::daemon::Daemon;
use crate::initramfs;
use crate::process::{Process, Streams};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::vmm::hardware::Hardware;
use crate::vmm::{qemu, uml, Attachment, StartedVmm, VmConfig, Vmm};
use crate::{HANG_TIMEOUT, MIB};

/// A balloon device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// Our daemon.
    Ours,
    /// QEMU's own `virtio-balloon-pci`. QEMU only.
    QemuOwn,
    /// No balloon device.
    None,
}

/// The configuration of a guest.
#[derive(Clone, Debug)]
pub struct Builder<'a> {
    pub(super) artifacts: &'a Artifacts,
    pub(super) vmm: Vmm,
    device: Device,
    pub(super) memory: u64,
    exact_memory: bool,
    features: Vec<&'a str>,
    device_options: Vec<&'a str>,
    properties: Vec<&'a str>,
    hardware: Hardware,
    series: Option<&'a str>,
    pub(super) external_device: Option<&'a Path>,
    hotplug_slot: bool,
    kexec_kernel: bool,
    suspendable: bool,
    kernel_arguments: &'a str,
    qmp_socket: bool,
    memory_file: Option<&'a Path>,
    files: Vec<(&'a str, &'a Path)>,
    console: Streams,
}

impl<'a> Builder<'a> {
    /// Creates the default configuration: 512 MiB of memory, and our device with statistics and free page hinting.
    #[must_use]
    pub fn new(artifacts: &'a Artifacts, vmm: Vmm) -> Self {
        let features = vec!["stats", "free-page-hint"];
        Self {
            artifacts,
            vmm,
            device: Device::Ours,
            memory: 512 * MIB,
            exact_memory: false,
            features,
            device_options: Vec::new(),
            properties: Vec::new(),
            hardware: Hardware::default(),
            series: None,
            external_device: None,
            hotplug_slot: false,
            kexec_kernel: false,
            suspendable: false,
            kernel_arguments: "",
            qmp_socket: false,
            memory_file: None,
            files: Vec::new(),
            console: Streams::Collected,
        }
    }

    /// Creates a configuration whose device, ours or QEMU's own, offers all balloon features except PAGE_POISON.
    #[must_use]
    pub fn with_all_features(artifacts: &'a Artifacts, vmm: Vmm, device: Device) -> Self {
        const FEATURES: [&str; 5] = [
            "must-tell-host",
            "stats",
            "deflate-on-oom",
            "free-page-hint",
            "free-page-reporting",
        ];
        let builder = Self::new(artifacts, vmm)
            .device(device)
            // With `init_on_alloc` the kernel clears the blocks that the driver allocates for hints, and the counts of
            // QEMU's own device do not show the hints.
            .kernel_arguments("init_on_alloc=0");
        match device {
            Device::QemuOwn => {
                builder.device_options(&["free-page-reporting=on", "deflate-on-oom=on"])
            }
            _ => builder.features(&FEATURES),
        }
    }

    /// Sets the balloon device.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Sets the size of memory in bytes, a multiple of 1 MiB. The debug kernel gets additional memory for its own use.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// Does not add memory on the debug kernel. In user-mode Linux, each page that a process fills may need a mapping
    /// on the host, and the host allows 65530.
    #[must_use]
    pub fn exact_memory(mut self) -> Self {
        self.exact_memory = true;
        self
    }

    /// Sets the features that our device offers.
    #[must_use]
    pub fn features(mut self, features: &[&'a str]) -> Self {
        self.features = features.to_vec();
        self
    }

    /// Sets further options of our device's command line, or further properties (`a=b`) of QEMU's device.
    #[must_use]
    pub fn device_options(mut self, options: &[&'a str]) -> Self {
        self.device_options = options.to_vec();
        self
    }

    /// Sets further properties (`a=b`) of the vhost-user device in QEMU.
    #[must_use]
    pub fn properties(mut self, properties: &[&'a str]) -> Self {
        self.properties = properties.to_vec();
        self
    }

    /// Sets the machine. QEMU only.
    #[must_use]
    pub fn hardware(mut self, hardware: Hardware) -> Self {
        self.hardware = hardware;
        self
    }

    /// Selects Debian's kernel of another series. QEMU only.
    #[must_use]
    pub fn series(mut self, series: &'a str) -> Self {
        self.series = Some(series);
        self
    }

    /// Uses another vhost-user device, which listens on `socket`.
    #[must_use]
    pub fn external_device(mut self, socket: &'a Path) -> Self {
        self.external_device = Some(socket);
        self
    }

    /// Puts the device into a hot-plug slot. QEMU only.
    #[must_use]
    pub fn hotplug_slot(mut self) -> Self {
        self.hotplug_slot = true;
        self
    }

    /// Prepares the guest for [`Guest::suspend_and_resume`]. QEMU only.
    #[must_use]
    pub fn suspendable(mut self) -> Self {
        self.suspendable = true;
        self
    }

    /// Adds a kernel and an initramfs for [`Guest::kexec`]. The kernel is the guest's own.
    #[must_use]
    pub fn kexec_kernel(mut self) -> Self {
        self.kexec_kernel = true;
        self
    }

    /// Sets further arguments for the kernel's command line.
    #[must_use]
    pub fn kernel_arguments(mut self, arguments: &'a str) -> Self {
        self.kernel_arguments = arguments;
        self
    }

    /// Adds a QMP socket to the VMM ([`Guest::vmm_qmp_socket`]). QEMU only.
    #[must_use]
    pub fn qmp_socket(mut self) -> Self {
        self.qmp_socket = true;
        self
    }

    /// Puts the guest's memory into the file at `path`. QEMU only.
    #[must_use]
    pub fn memory_file(mut self, path: &'a Path) -> Self {
        self.memory_file = Some(path);
        self
    }

    /// Adds executable files to the guest. Each pair is the path in the guest and the path on the host.
    #[must_use]
    pub fn files(mut self, files: &[(&'a str, &'a Path)]) -> Self {
        self.files = files.to_vec();
        self
    }

    /// Connects the console to the terminal.
    #[must_use]
    pub fn on_terminal(mut self) -> Self {
        self.console = Streams::Terminal;
        self
    }

    /// Boots the guest, fills and frees its memory except `spare` bytes (see [`Guest::fill_and_free`]), and loads
    /// `driver`. Returns the guest and its memory usage ([`Guest::settled_memory_usage`]).
    ///
    /// # Errors
    ///
    /// Same as [`Builder::boot`] and [`Guest::load`].
    pub fn boot_filled(self, spare: u64, driver: Driver) -> Result<(Guest, MemoryUsage)> {
        const SEED: u64 = 10;
        /// The maximum memory use of the driver.
        const OF_DRIVER: u64 = 8 * MIB;
        let with_reporting = self.features.contains(&"free-page-reporting");
        let mut guest = self.boot()?;
        guest.fill_and_free(spare, SEED)?;
        let without = if with_reporting {
            Some(guest.settled_memory_usage()?)
        } else {
            None
        };
        guest.load(driver)?;
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let before = guest.settled_memory_usage()?;
            // Pages in a report count as used.
            if without.is_none_or(|without| before.used <= without.used + OF_DRIVER) {
                return Ok((guest, before));
            }
            ensure!(
                Instant::now() < deadline,
                "the driver has {before:?}, and without it there was {without:?}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Starts the guest and waits until it is up. No driver is loaded.
    ///
    /// # Errors
    ///
    /// Fails if an artifact is missing, or the guest does not come up. The error contains the output of all processes.
    pub fn boot(mut self) -> Result<Guest> {
        let Prepared {
            daemon,
            started,
            scratch,
        } = self.start(false)?;
        Guest::from_started(self, daemon, started, scratch)
    }

    /// Starts a machine without a balloon that waits for an incoming migration. QEMU only.
    ///
    /// # Errors
    ///
    /// Fails if an artifact is missing, or the VMM does not come up.
    pub fn start_incoming(mut self) -> Result<IncomingVm> {
        self.device = Device::None;
        let Prepared {
            started, scratch, ..
        } = self.start(true)?;
        let StartedVmm {
            process: mut vmm,
            agent,
            monitor,
        } = started;
        let monitor = monitor.context("the VMM has no monitor")?;
        let monitor = Qmp::new(monitor).with_context(|| vmm.diagnostics())?;
        Ok(IncomingVm {
            vmm,
            agent,
            monitor,
            scratch,
        })
    }

    fn start(&mut self, incoming: bool) -> Result<Prepared> {
        let vmm = self.vmm.resolve()?;
        if !self.exact_memory {
            self.memory += vmm.overhead();
        }
        let kernel = kernel(self.artifacts, vmm, self.series)?;
        let scratch = Scratch::new()?;
        let initramfs = scratch.path("initramfs.cpio");
        let modules: Vec<&Path> = [Some(&kernel.c_driver), kernel.our_driver.as_ref()]
            .into_iter()
            .flatten()
            .chain(&kernel.modules)
            .map(AsRef::as_ref)
            .collect();
        let busybox = self.artifacts.rootfs.join("usr/bin/busybox");
        let agent = &self.artifacts.agent;
        let next_initramfs = scratch.path("next-initramfs.cpio");
        let early: Vec<String> = (0..kernel.early.len()).map(initramfs::early_path).collect();
        let early = early.iter().zip(&kernel.early);
        let mut more: Vec<(&str, &Path)> = self.files.clone();
        more.extend(early.map(|(inside, path)| (inside.as_str(), path.as_path())));
        if self.kexec_kernel {
            initramfs::write(&next_initramfs, agent, &busybox, &modules, &[])?;
            more.push((initramfs::KEXEC_KERNEL, &kernel.image));
            more.push((initramfs::KEXEC_INITRAMFS, &next_initramfs));
        }
        initramfs::write(&initramfs, agent, &busybox, &modules, &more)?;
        let (daemon, device) = match (self.external_device, self.device) {
            (Some(socket), _) => (None, Attachment::VhostUser(socket.to_owned())),
            (None, Device::None) => (None, Attachment::None),
            (None, Device::QemuOwn) => {
                let properties = qemu::properties(&self.device_options);
                (None, Attachment::QemuOwn(properties))
            }
            (None, Device::Ours) => {
                let (program, options) = (&self.artifacts.daemon, &self.device_options);
                let daemon = Daemon::start(program, &scratch, &self.features, options)?;
                let socket = daemon.socket().to_owned();
                (Some(daemon), Attachment::VhostUser(socket))
            }
        };
        let config = VmConfig {
            memory: self.memory,
            initramfs,
            device,
            properties: qemu::properties(&self.properties),
            hardware: self.hardware.clone(),
            hotplug_slot: self.hotplug_slot,
            suspendable: self.suspendable,
            kernel_arguments: self.series.map_or("", series_arguments).to_owned()
                + self.kernel_arguments,
            memory_file: self.memory_file.map(Path::to_owned),
            incoming,
            qmp_socket: self.qmp_socket.then(|| scratch.path(VMM_QMP_SOCKET)),
            console: self.console,
        };
        let started = match vmm {
            Vmm::Qemu => {
                /// The minimum memory for an unpacked kernel. With less, the initramfs does not fit.
                const ROOM: u64 = 192 * MIB;
                // On wake-up from sleep, the machine is reset, and QEMU would write an unpacked kernel over the
                // sleeping one.
                let starts_unpacked = self.memory >= ROOM && !self.suspendable;
                let unpacked = kernel.unpacked.as_ref().filter(|_| starts_unpacked);
                let image = unpacked.unwrap_or(&kernel.image);
                qemu::start(&self.artifacts.rootfs, image, &config)?
            }
            Vmm::Uml => uml::start(&kernel.image, &uml::USUAL_ARGUMENTS, &config)?,
            Vmm::Debug => uml::start(&kernel.image, &uml::DEBUG_ARGUMENTS, &config)?,
        };
        Ok(Prepared {
            daemon,
            started,
            scratch,
        })
    }
}

/// The parts of a guest that is not up yet.
struct Prepared {
    // Dropped in this order: the VMM before the daemon, both before their folder.
    started: StartedVmm,
    daemon: Option<Daemon>,
    scratch: Scratch,
}

/// A machine that waits for an incoming migration.
#[derive(Debug)]
pub struct IncomingVm {
    pub(super) vmm: Process,
    pub(super) agent: UnixStream,
    pub(super) monitor: Qmp,
    pub(super) scratch: Scratch,
}

impl IncomingVm {
    /// Returns the machine's scratch folder.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Returns the path of the VMM's QMP socket. The socket exists only if [`Builder::qmp_socket`] was called.
    #[must_use]
    pub fn vmm_qmp_socket(&self) -> PathBuf {
        self.scratch.path(VMM_QMP_SOCKET)
    }
}

/// Returns the arguments that a kernel of this series needs.
fn series_arguments(series: &str) -> &'static str {
    match series {
        // If its clocksource watchdog is late, it runs again at once. It then takes a delay of a few microseconds on a
        // busy host for a wrong clock. Later series wait.
        "7.2" => "tsc=nowatchdog ",
        _ => "",
    }
}

fn kernel<'a>(artifacts: &'a Artifacts, vmm: Vmm, series: Option<&str>) -> Result<&'a Kernel> {
    if let Some(series) = series {
        let series_kernel = artifacts.series_kernels.get(series);
        return series_kernel.with_context(|| format!("no kernel of series {series} was set up"));
    }
    match vmm {
        Vmm::Qemu => artifacts
            .stock
            .as_ref()
            .context("no stock kernel was set up"),
        Vmm::Uml => artifacts
            .uml
            .as_ref()
            .context("no user-mode Linux kernel was set up"),
        Vmm::Debug => artifacts
            .debug
            .as_ref()
            .context("no debug kernel was set up"),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest: a VMM, a balloon device, and what the guest does when told.

use std::mem::replace;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{
    Call, Fill, Free, KernelLog, KernelLogRecord, ListFolder, LoadModule, MemInfo, MemInfoFields,
    Modules, PowerOff, Release, UnloadModule, WaitKernelLog,
};

use crate::agent::AgentClient;
use crate::artifacts::{Artifacts, Kernel};
use crate::check::MemoryUsage;
use crate::daemon::Daemon;
use crate::host;
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
    /// None.
    None,
}

/// A balloon driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// `virtio_balloon_rs.ko`.
    Ours,
    /// The kernel's own `virtio_balloon.ko`.
    C,
}

impl Driver {
    /// The drivers that a test is to go through one after the other: both, but on the debug kernel only ours.
    ///
    /// Linux's own reads and writes configuration space from two work items at once. With two processors user-mode Linux
    /// then takes the answer to the one for that to the other (`VHOST_USER_GET_CONFIG failed: -71`), and the balloon stands
    /// still. Ours has a lock around it. A test that cannot do without the other has `c_driver` in its name.
    #[must_use]
    pub fn each() -> &'static [Self] {
        if Vmm::is_debug_only() {
            &[Self::Ours]
        } else {
            &[Self::Ours, Self::C]
        }
    }

    /// The module's name, as `/proc/modules` has it.
    #[must_use]
    pub fn module_name(self) -> &'static str {
        match self {
            Self::Ours => "virtio_balloon_rs",
            Self::C => "virtio_balloon",
        }
    }
}

/// What a guest is to be made of.
#[derive(Clone, Debug)]
pub struct Builder<'a> {
    artifacts: &'a Artifacts,
    vmm: Vmm,
    device: Device,
    memory: u64,
    exact_memory: bool,
    features: Vec<&'a str>,
    device_options: Vec<&'a str>,
    properties: Vec<&'a str>,
    hardware: Hardware,
    series: Option<&'a str>,
    external_device: Option<&'a Path>,
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
    /// 512 MiB of memory and our device with free page hinting, unless told otherwise.
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

    /// Another device.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// So many bytes of memory: a multiple of 1 MiB. The debug kernel gets more, as much as it needs more for itself.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = bytes;
        self
    }

    /// No more memory than that, on the debug kernel either. What a process of user-mode Linux fills page by page may take a
    /// mapping on the host for each page, and of these there are 65530.
    #[must_use]
    pub fn exact_memory(mut self) -> Self {
        self.exact_memory = true;
        self
    }

    /// The features that our device offers.
    #[must_use]
    pub fn features(mut self, features: &[&'a str]) -> Self {
        self.features = features.to_vec();
        self
    }

    /// Further options of our device's command line, or further properties (`a=b`) of QEMU's device.
    #[must_use]
    pub fn device_options(mut self, options: &[&'a str]) -> Self {
        self.device_options = options.to_vec();
        self
    }

    /// More properties (`a=b`) of the vhost-user device that QEMU shows the guest.
    #[must_use]
    pub fn properties(mut self, properties: &[&'a str]) -> Self {
        self.properties = properties.to_vec();
        self
    }

    /// Another machine. QEMU only.
    #[must_use]
    pub fn hardware(mut self, hardware: Hardware) -> Self {
        self.hardware = hardware;
        self
    }

    /// Debian's kernel of another series instead of the stock one. QEMU only.
    #[must_use]
    pub fn series(mut self, series: &'a str) -> Self {
        self.series = Some(series);
        self
    }

    /// Another vhost-user device instead, which listens on `socket`.
    #[must_use]
    pub fn external_device(mut self, socket: &'a Path) -> Self {
        self.external_device = Some(socket);
        self
    }

    /// Puts the device into a slot from which it can be pulled. QEMU only.
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

    /// Gives the guest a kernel and an initramfs that it can be told to start: the same as it has itself.
    #[must_use]
    pub fn kexec_kernel(mut self) -> Self {
        self.kexec_kernel = true;
        self
    }

    /// More words for the kernel's command line.
    #[must_use]
    pub fn kernel_arguments(mut self, arguments: &'a str) -> Self {
        self.kernel_arguments = arguments;
        self
    }

    /// Has the VMM listen for operators ([`Guest::vmm_qmp_socket`]). QEMU only.
    #[must_use]
    pub fn qmp_socket(mut self) -> Self {
        self.qmp_socket = true;
        self
    }

    /// Puts the guest's memory into this file. QEMU only.
    #[must_use]
    pub fn memory_file(mut self, path: &'a Path) -> Self {
        self.memory_file = Some(path);
        self
    }

    /// More files in the guest, each a program: where they lie there, and on the host.
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

    /// Starts the guest, loads `driver` once all free memory but `spare` bytes has been in use (see
    /// [`Guest::fill_and_free`]), and returns the guest with what [`Guest::settled_memory_usage`] says then.
    ///
    /// # Errors
    ///
    /// As [`Builder::boot`] and [`Guest::load`].
    pub fn boot_filled(self, spare: u64, driver: Driver) -> Result<(Guest, MemoryUsage)> {
        const SEED: u64 = 10;
        /// The maximum memory use of a driver itself.
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

    /// Starts the guest and waits until it is up, with no driver loaded.
    ///
    /// # Errors
    ///
    /// If a part is missing or the guest does not come up; the error holds the diaries of all processes.
    pub fn boot(mut self) -> Result<Guest> {
        let Prepared {
            daemon,
            started,
            scratch,
        } = self.start(false)?;
        Guest::from_started(self, daemon, started, scratch)
    }

    /// Starts a machine without a balloon that waits for a guest from elsewhere. QEMU only.
    ///
    /// # Errors
    ///
    /// If a part is missing, or the VMM does not come up.
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
                /// With less, an unpacked kernel leaves no room for the initramfs.
                const ROOM: u64 = 192 * MIB;
                // As it wakes from sleep the machine is reset, and then QEMU writes an unpacked kernel over the one that slept.
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

/// What a guest is made of, before it is up.
struct Prepared {
    // Dropped in this order: the VMM before the daemon, both before their folder.
    started: StartedVmm,
    daemon: Option<Daemon>,
    scratch: Scratch,
}

/// A machine that waits for a guest from elsewhere.
#[derive(Debug)]
pub struct IncomingVm {
    vmm: Process,
    agent: UnixStream,
    monitor: Qmp,
    scratch: Scratch,
}

impl IncomingVm {
    /// Its folder.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Where its VMM listens for operators, if it was built so.
    #[must_use]
    pub fn vmm_qmp_socket(&self) -> PathBuf {
        self.scratch.path(VMM_QMP_SOCKET)
    }
}

/// What a guest that was moved has left behind.
#[derive(Debug)]
pub struct SourceVm {
    // Dropped in this order: the VMM before the daemon, both before their folder.
    /// The VMM.
    pub vmm: Process,
    /// Its monitor.
    pub monitor: Option<Qmp>,
    /// Our device.
    pub daemon: Option<Daemon>,
    _scratch: Scratch,
}

/// The name of the socket at which a VMM listens for operators.
const VMM_QMP_SOCKET: &str = "vmm-qmp.sock";
/// The parameter of our driver for the host timeout.
const HOST_TIMEOUT: &str = "host_timeout_ms";
/// The parameters that set the default host timeout, for a device that does not answer.
pub const DEFAULT_HOST_TIMEOUT: &str = "host_timeout_ms=2000";

/// What the kernel of a series needs on its command line.
fn series_arguments(series: &str) -> &'static str {
    match series {
        // Its watchdog of clocks, once it is late, runs again at once, and takes a few microseconds of a busy host for a clock
        // that is wrong. Later series wait.
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

/// A guest that is up. If it is dropped before [`Guest::power_off`] or [`Guest::kill`], something went wrong: then it
/// prints what its processes said.
#[derive(Debug)]
pub struct Guest {
    // Dropped in this order: the VMM before the daemon, both before their folder.
    pub(crate) vmm: Process,
    pub(crate) agent: AgentClient,
    pub(crate) monitor: Option<Qmp>,
    pub(crate) daemon: Option<Daemon>,
    pub(crate) scratch: Scratch,
    vmm_kind: Vmm,
    memory: u64,
    pub(crate) daemon_program: PathBuf,
    is_debug_kernel: bool,
    external_device: bool,
    ended: bool,
    pub(crate) log: Vec<KernelLogRecord>,
}

impl Guest {
    /// Waits until what was started is up.
    fn from_started(
        builder: Builder<'_>,
        mut daemon: Option<Daemon>,
        started: StartedVmm,
        scratch: Scratch,
    ) -> Result<Self> {
        let StartedVmm {
            process: mut vmm,
            agent,
            monitor,
        } = started;
        let met = AgentClient::connect(agent, HANG_TIMEOUT)
            .and_then(|agent| Ok((agent, monitor.map(Qmp::new).transpose()?)));
        match met {
            Ok((agent, monitor)) => {
                let mut guest = Self {
                    vmm,
                    agent,
                    monitor,
                    daemon,
                    scratch,
                    vmm_kind: builder.vmm,
                    memory: builder.memory,
                    daemon_program: builder.artifacts.daemon.clone(),
                    is_debug_kernel: matches!(builder.vmm.resolve(), Ok(Vmm::Debug)),
                    external_device: builder.external_device.is_some(),
                    ended: false,
                    log: Vec::new(),
                };
                // What the kernel said of this machine is not what a test looks for.
                guest.kernel_log()?;
                Ok(guest)
            }
            Err(error) => {
                let daemon = daemon
                    .as_mut()
                    .map(|daemon| daemon.process().diagnostics())
                    .unwrap_or_default();
                Err(error.context(format!(
                    "the guest did not come up\n{}{daemon}",
                    vmm.diagnostics()
                )))
            }
        }
    }

    /// Goes on with the guest where it has been moved to, and where `daemon` is its device. Returns what is left of where it
    /// was.
    pub fn switch_to(&mut self, to: IncomingVm, daemon: Daemon) -> SourceVm {
        self.agent.switch_stream(to.agent);
        SourceVm {
            vmm: replace(&mut self.vmm, to.vmm),
            monitor: self.monitor.replace(to.monitor),
            daemon: self.daemon.replace(daemon),
            _scratch: replace(&mut self.scratch, to.scratch),
        }
    }

    /// Bytes of memory that the machine has.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// What runs it.
    #[must_use]
    pub fn vmm_kind(&self) -> Vmm {
        self.vmm_kind
    }

    /// The VMM's process.
    pub fn vmm(&mut self) -> &mut Process {
        &mut self.vmm
    }

    /// The program in the guest.
    pub fn agent(&mut self) -> &mut AgentClient {
        &mut self.agent
    }

    /// Asks the program in the guest to do something.
    ///
    /// # Errors
    ///
    /// As [`AgentClient::call`].
    pub fn call<C: Call>(&mut self, call: C) -> Result<C::Reply> {
        self.agent.call(call)
    }

    /// Our device.
    ///
    /// # Errors
    ///
    /// If the guest has another or none.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon
            .as_mut()
            .context("the guest does not have our device")
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    ///
    /// If the VMM has none.
    pub fn monitor(&mut self) -> Result<&mut Qmp> {
        self.monitor.as_mut().context("the VMM has no monitor")
    }

    /// Where a VMM that was built with [`Builder::qmp_socket`] listens for them.
    #[must_use]
    pub fn vmm_qmp_socket(&self) -> Option<PathBuf> {
        let socket = self.scratch.path(VMM_QMP_SOCKET);
        socket.exists().then_some(socket)
    }

    /// The connection on which the balloon is commanded: our daemon's, or QEMU's monitor.
    ///
    /// # Errors
    ///
    /// If the guest has no device.
    pub fn balloon_qmp(&mut self) -> Result<&mut Qmp> {
        match (&mut self.daemon, &mut self.monitor) {
            (Some(daemon), _) => Ok(daemon.qmp()),
            (None, Some(monitor)) => Ok(monitor),
            (None, None) => bail!("the guest has no balloon device"),
        }
    }

    /// Bytes that the guest's memory occupies on the host, as the host's kernel says.
    ///
    /// # Errors
    ///
    /// If the VMM is no more.
    pub fn host_memory_in_use(&self) -> Result<u64> {
        host::guest_memory_in_use(self.vmm.id())
    }

    /// Waits until the guest's memory occupies no more than `at_most` bytes on the host, and returns how many. The host
    /// has no event for this.
    ///
    /// # Errors
    ///
    /// If it occupies more for all of `timeout`, or the VMM is no more.
    pub fn wait_host_memory_in_use(&self, at_most: u64, timeout: Duration) -> Result<u64> {
        let deadline = Instant::now() + timeout;
        loop {
            let now = self.host_memory_in_use()?;
            if now <= at_most {
                return Ok(now);
            }
            ensure!(
                Instant::now() < deadline,
                "the guest's memory occupies {now} bytes, and not {at_most}, after {timeout:?}"
            );
            sleep(Duration::from_millis(10));
        }
    }

    /// Loads a driver with parameters, and waits until the device is bound to it.
    ///
    /// Our driver gets a host timeout of a minute, for a busy host. Exceptions: `parameters` set it, or the device is foreign and
    /// may never answer.
    ///
    /// # Errors
    ///
    /// If the guest refuses.
    pub fn load_with(&mut self, driver: Driver, parameters: &str) -> Result<()> {
        let path = initramfs::module_path(&format!("{}.ko", driver.module_name()));
        let parameters =
            if driver == Driver::C || self.external_device || parameters.contains(HOST_TIMEOUT) {
                parameters.to_owned()
            } else {
                format!(
                    "{HOST_TIMEOUT}={} {parameters}",
                    HANG_TIMEOUT.as_millis() / 10
                )
            };
        self.call(LoadModule { path, parameters })?;
        // The device hears of it a little later than the driver is done.
        match &mut self.daemon {
            Some(daemon) => daemon.wait_driver(),
            None => Ok(()),
        }
    }

    /// Loads another module of the initramfs.
    ///
    /// # Errors
    ///
    /// If the guest refuses.
    pub fn load_module(&mut self, name: &str) -> Result<()> {
        self.call(LoadModule {
            path: initramfs::module_path(&format!("{name}.ko")),
            parameters: String::new(),
        })
    }

    /// The names in a folder of the guest; none if it is not there.
    ///
    /// # Errors
    ///
    /// As [`AgentClient::call`].
    pub fn list_folder(&mut self, path: &str) -> Result<Vec<String>> {
        self.call(ListFolder {
            path: path.to_owned(),
        })
    }

    /// Loads a driver.
    ///
    /// # Errors
    ///
    /// If the guest refuses.
    pub fn load(&mut self, driver: Driver) -> Result<()> {
        self.load_with(driver, "")
    }

    /// Unloads a driver.
    ///
    /// # Errors
    ///
    /// If the guest refuses.
    pub fn unload(&mut self, driver: Driver) -> Result<()> {
        self.call(UnloadModule {
            name: driver.module_name().to_owned(),
        })?;
        let loaded = self.call(Modules {})?;
        ensure!(
            !loaded.iter().any(|name| name == driver.module_name()),
            "{} is still there",
            driver.module_name()
        );
        Ok(())
    }

    /// Waits until a new driver has brought the balloon to `target`, in bytes of guest memory.
    ///
    /// Asks the guest first: until the new driver writes `actual`, the device reports the old driver's size.
    ///
    /// # Errors
    ///
    /// If it has not by the limit.
    pub fn wait_balloon_after_reload(&mut self, target: u64, timeout: Duration) -> Result<()> {
        let pages = (self.memory() - target) / self.agent().hello().page_size;
        let deadline = Instant::now() + timeout;
        loop {
            let now = self.vmstat_counter("nr_balloon_pages")?;
            if now == pages {
                return self.balloon_qmp()?.wait_balloon(target, timeout);
            }
            ensure!(
                Instant::now() < deadline,
                "the balloon has {now} of {pages} pages after {timeout:?}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// The guest's memory, as its kernel says.
    ///
    /// # Errors
    ///
    /// As [`AgentClient::call`].
    pub fn mem_info(&mut self) -> Result<MemInfoFields> {
        self.call(MemInfo {})
    }

    /// Has the guest touch and free all of its memory but `spare` bytes: what is free afterwards has contents.
    ///
    /// # Errors
    ///
    /// As [`AgentClient::call`].
    pub fn fill_and_free(&mut self, spare: u64, seed: u64) -> Result<u64> {
        let bytes = self.mem_info()?.free().saturating_sub(spare);
        let filled = self.call(Fill {
            bytes,
            keep_every: 0,
            seed,
        })?;
        self.call(Release {
            workload: filled.workload,
        })?;
        self.call(Free {
            workload: filled.workload,
        })?;
        Ok(bytes)
    }

    /// The kernel log since the last call of this.
    ///
    /// # Errors
    ///
    /// As [`AgentClient::call`].
    pub fn kernel_log(&mut self) -> Result<Vec<KernelLogRecord>> {
        let lines = self.call(KernelLog {})?;
        self.log.extend_from_slice(&lines);
        Ok(lines)
    }

    /// Waits for a line that the kernel has logged since the last call of [`Guest::kernel_log`].
    ///
    /// # Errors
    ///
    /// If there is none by the limit.
    pub fn wait_kernel_log(
        &mut self,
        substring: &str,
        timeout: Duration,
    ) -> Result<KernelLogRecord> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.call(WaitKernelLog {
            substring: substring.to_owned(),
            from: self.log.last().map_or(0, |line| line.sequence + 1),
            timeout_ms,
        })
    }

    /// Switches the guest off and waits for its end and, if it ends with its front end, the daemon's.
    ///
    /// # Errors
    ///
    /// If the VMM does not end, or the debug kernel has something to report.
    pub fn power_off(&mut self) -> Result<ExitStatus> {
        if self.is_debug_kernel && !self.has_lost_its_device()? {
            self.check_debug_kernel()?;
        }
        self.call(PowerOff {})?;
        let status = self.vmm.wait(HANG_TIMEOUT)?;
        self.ended = true;
        Ok(status)
    }

    /// Whether our daemon is no more: then user-mode Linux warns, of its own accord, that it cannot talk to it.
    fn has_lost_its_device(&mut self) -> Result<bool> {
        match &mut self.daemon {
            Some(daemon) => Ok(daemon.process().status()?.is_some()),
            None => Ok(false),
        }
    }

    /// Kills the VMM.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.ended = true;
        self.vmm.kill()
    }

    /// The names of the files and sockets in the guest's folder.
    ///
    /// # Errors
    ///
    /// If the folder cannot be listed.
    pub fn files(&self) -> Result<Vec<String>> {
        self.scratch.contents()
    }

    /// What all processes of the guest said.
    #[must_use]
    pub fn diagnostics(&mut self) -> String {
        let mut text = self.vmm.diagnostics();
        if let Some(daemon) = &mut self.daemon {
            text.push_str(&daemon.process().diagnostics());
        }
        text
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.ended && !std::thread::panicking() {
            return;
        }
        // A guest that still answers may know more than its console showed.
        if matches!(self.vmm.status(), Ok(None)) {
            if let Ok(lines) = self.agent.call_within(KernelLog {}, Duration::from_secs(2)) {
                self.log.extend(lines);
            }
        }
        eprintln!("--- kernel log, as the guest told it, from the start of its first process");
        let first = self
            .log
            .iter()
            .position(|line| line.text.starts_with("Run /init"))
            .unwrap_or_default();
        for line in self.log.get(first..).unwrap_or_default() {
            let seconds = Duration::from_micros(line.time_us).as_secs_f64();
            eprintln!("<{}>[{seconds:12.6}] {}", line.level, line.text);
        }
        eprintln!("{}", self.diagnostics());
    }
}

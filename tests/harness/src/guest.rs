// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest: a VMM, a balloon device, and the agent in the guest.

mod builder;

use std::mem::replace;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{
    Call, Fill, Filled, Free, KernelLog, KernelLogRecord, ListFolder, LoadModule, MemInfo,
    MemInfoFields, Modules, PowerOff, Release, Run, UnloadModule, Verify, WaitKernelLog,
};

use crate::agent::AgentClient;
use crate::daemon::Daemon;
use crate::host;
use crate::initramfs;
use crate::process::{Process, Signal};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::vmm::{StartedVmm, Vmm};
use crate::HANG_TIMEOUT;

pub use builder::{Builder, Device, IncomingVm};

/// A balloon driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// `virtio_balloon_rs.ko`.
    Ours,
    /// The kernel's own `virtio_balloon.ko`.
    C,
}

impl Driver {
    /// Returns the drivers that a test runs with, one after the other: both, or only ours on the debug kernel.
    ///
    /// The C driver accesses the config space from two work items at the same time. With two processors, user-mode
    /// Linux then mixes up the answers (`VHOST_USER_GET_CONFIG failed: -71`), and the balloon stops. Our driver takes a
    /// lock. A test that needs the C driver has `c_driver` in its name.
    #[must_use]
    pub fn each() -> &'static [Self] {
        if Vmm::is_debug_only() {
            &[Self::Ours]
        } else {
            &[Self::Ours, Self::C]
        }
    }

    /// Returns the module's name, as in `/proc/modules`.
    #[must_use]
    pub fn module_name(self) -> &'static str {
        match self {
            Self::Ours => "virtio_balloon_rs",
            Self::C => "virtio_balloon",
        }
    }
}

/// The source of a completed migration.
#[derive(Debug)]
pub struct SourceVm {
    // Dropped in this order: the VMM before the daemon, both before their folder.
    /// The VMM.
    pub vmm: Process,
    /// The VMM's monitor.
    pub monitor: Option<Qmp>,
    /// Our device.
    pub daemon: Option<Daemon>,
    _scratch: Scratch,
}

/// The file name of a VMM's QMP socket.
const VMM_QMP_SOCKET: &str = "vmm-qmp.sock";
/// The parameter of our driver that sets the host timeout.
const HOST_TIMEOUT: &str = "host_timeout_ms";
/// The parameter with the driver's default host timeout, for a device that does not answer.
pub const DEFAULT_HOST_TIMEOUT: &str = "host_timeout_ms=2000";

/// A guest that is up. A guest that is dropped before [`Guest::power_off`] or [`Guest::kill`] belongs to a failed test:
/// it then prints its kernel log and the output of its processes.
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
    /// Waits until the guest is up.
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
                // The messages of the boot are not part of a test.
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

    /// Continues with the guest on the machine to which it was migrated, where `daemon` is its device. Returns the
    /// source.
    pub fn switch_to(&mut self, to: IncomingVm, daemon: Daemon) -> SourceVm {
        self.agent.switch_stream(to.agent);
        SourceVm {
            vmm: replace(&mut self.vmm, to.vmm),
            monitor: self.monitor.replace(to.monitor),
            daemon: self.daemon.replace(daemon),
            _scratch: replace(&mut self.scratch, to.scratch),
        }
    }

    /// Returns the size of the machine's memory, in bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Returns the VMM that runs the guest.
    #[must_use]
    pub fn vmm_kind(&self) -> Vmm {
        self.vmm_kind
    }

    /// Returns the process of the VMM.
    pub fn vmm(&mut self) -> &mut Process {
        &mut self.vmm
    }

    /// Returns the connection to the agent.
    pub fn agent(&mut self) -> &mut AgentClient {
        &mut self.agent
    }

    /// Sends a call to the agent and waits for the answer.
    ///
    /// # Errors
    ///
    /// Same as [`AgentClient::call`].
    pub fn call<C: Call>(&mut self, call: C) -> Result<C::Reply> {
        self.agent.call(call)
    }

    /// Returns our device.
    ///
    /// # Errors
    ///
    /// Fails if the guest has another device, or none.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon
            .as_mut()
            .context("the guest does not have our device")
    }

    /// Returns QEMU's monitor.
    ///
    /// # Errors
    ///
    /// Fails if the VMM has none.
    pub fn monitor(&mut self) -> Result<&mut Qmp> {
        self.monitor.as_mut().context("the VMM has no monitor")
    }

    /// Returns the path of the VMM's QMP socket, if it exists. See [`Builder::qmp_socket`].
    #[must_use]
    pub fn vmm_qmp_socket(&self) -> Option<PathBuf> {
        let socket = self.scratch.path(VMM_QMP_SOCKET);
        socket.exists().then_some(socket)
    }

    /// Returns the QMP connection that controls the balloon: our daemon's, or QEMU's monitor.
    ///
    /// # Errors
    ///
    /// Fails if the guest has neither.
    pub fn balloon_qmp(&mut self) -> Result<&mut Qmp> {
        match (&mut self.daemon, &mut self.monitor) {
            (Some(daemon), _) => Ok(daemon.qmp()),
            (None, Some(monitor)) => Ok(monitor),
            (None, None) => bail!("the guest has no balloon device"),
        }
    }

    /// Returns the size of the guest's memory that is allocated on the host, in bytes.
    ///
    /// # Errors
    ///
    /// Fails if the VMM has ended.
    pub fn host_memory_in_use(&self) -> Result<u64> {
        host::guest_memory_in_use(self.vmm.id())
    }

    /// Waits until at most `at_most` bytes of the guest's memory are allocated on the host, and returns the allocated
    /// size. The host has no event for this.
    ///
    /// # Errors
    ///
    /// Fails if more is allocated after `timeout`, or the VMM has ended.
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

    /// Loads a driver with parameters. If the device is our daemon, waits until the daemon has a driver.
    ///
    /// Our driver gets a host timeout of one minute, because the host may be busy. Exceptions: `parameters` set the
    /// timeout, or the device is external and may never answer.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses.
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
        // The driver is ready a moment before the daemon knows it.
        match &mut self.daemon {
            Some(daemon) => daemon.wait_driver(),
            None => Ok(()),
        }
    }

    /// Loads another module from the initramfs.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses.
    pub fn load_module(&mut self, name: &str) -> Result<()> {
        self.call(LoadModule {
            path: initramfs::module_path(&format!("{name}.ko")),
            parameters: String::new(),
        })
    }

    /// Lists the names in a folder of the guest. Empty if the folder does not exist.
    ///
    /// # Errors
    ///
    /// Same as [`AgentClient::call`].
    pub fn list_folder(&mut self, path: &str) -> Result<Vec<String>> {
        self.call(ListFolder {
            path: path.to_owned(),
        })
    }

    /// Loads a driver with the default parameters of the tests. See [`Guest::load_with`].
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses.
    pub fn load(&mut self, driver: Driver) -> Result<()> {
        self.load_with(driver, "")
    }

    /// Unloads a driver.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses.
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

    /// Waits until a newly loaded driver has resized the guest to `target` bytes of memory.
    ///
    /// Asks the guest first: until the new driver writes `actual`, the device reports the old driver's size.
    ///
    /// # Errors
    ///
    /// Fails if the guest has not reached `target` within `timeout`.
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

    /// Returns the guest's `/proc/meminfo`.
    ///
    /// # Errors
    ///
    /// Same as [`AgentClient::call`].
    pub fn mem_info(&mut self) -> Result<MemInfoFields> {
        self.call(MemInfo {})
    }

    /// Makes the guest fill and free its free memory except `spare` bytes, so that free pages have contents. Returns
    /// the size of the filled memory, in bytes.
    ///
    /// # Errors
    ///
    /// Same as [`AgentClient::call`].
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

    /// Starts a process in the guest that fills `bytes` of memory. [`Fill`] describes `keep_every`.
    ///
    /// # Errors
    ///
    /// Same as [`AgentClient::call`].
    pub fn fill(&mut self, bytes: u64, keep_every: u64, seed: u64) -> Result<Filled> {
        self.call(Fill {
            bytes,
            keep_every,
            seed,
        })
    }

    /// Fills `bytes` of the guest's memory, verifies them, and frees them.
    ///
    /// # Errors
    ///
    /// Fails if the content of a page is wrong.
    pub fn fill_and_verify(&mut self, bytes: u64, seed: u64) -> Result<Filled> {
        let filled = self.fill(bytes, 1, seed)?;
        let workload = filled.workload;
        let found = self.call(Verify { workload })?;
        ensure!(found.wrong == 0 && found.pages > 0, "{found:?}");
        self.call(Free { workload })?;
        Ok(filled)
    }

    /// Runs a shell script in the guest and returns its output.
    ///
    /// # Errors
    ///
    /// Fails if the script fails.
    pub fn shell(&mut self, script: &str) -> Result<String> {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let done = self.call(Run { argv })?;
        ensure!(done.status == Some(0), "{script}: {done:?}");
        Ok(done.stdout)
    }

    /// Stops our daemon with SIGSTOP. [`Guest::continue_daemon`] resumes it.
    ///
    /// First calls the agent. While user-mode Linux waits for the daemon's answer to a configuration write, a stopped
    /// daemon would stop the whole guest, whose kernel has one thread. While the agent answers, no such write is in
    /// progress. The guest starts none unless the device sends something.
    ///
    /// # Errors
    ///
    /// Fails if the guest has another device, or the daemon has ended.
    pub fn stop_daemon(&mut self) -> Result<()> {
        self.mem_info()?;
        self.daemon()?.process().stop()
    }

    /// Resumes our daemon after [`Guest::stop_daemon`].
    ///
    /// # Errors
    ///
    /// Fails if the guest has another device, or the daemon has ended.
    pub fn continue_daemon(&mut self) -> Result<()> {
        self.daemon()?.process().signal(Signal::SIGCONT)
    }

    /// Returns the records of the kernel log since the last call.
    ///
    /// # Errors
    ///
    /// Same as [`AgentClient::call`].
    pub fn kernel_log(&mut self) -> Result<Vec<KernelLogRecord>> {
        let lines = self.call(KernelLog {})?;
        self.log.extend_from_slice(&lines);
        Ok(lines)
    }

    /// Waits for a record that the kernel logs after the last call of [`Guest::kernel_log`].
    ///
    /// # Errors
    ///
    /// Fails if there is no such record within `timeout`.
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

    /// Switches the guest off, waits until the VMM has ended, and returns its exit status.
    ///
    /// # Errors
    ///
    /// Fails if the VMM does not end, or the debug kernel has reported a problem.
    pub fn power_off(&mut self) -> Result<ExitStatus> {
        if self.is_debug_kernel && !self.has_lost_its_device()? {
            self.check_debug_kernel()?;
        }
        self.call(PowerOff {})?;
        let status = self.vmm.wait(HANG_TIMEOUT)?;
        self.ended = true;
        Ok(status)
    }

    /// Returns whether our daemon has ended. In that case user-mode Linux warns that it cannot talk to its device.
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
    /// Fails if the VMM does not end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.ended = true;
        self.vmm.kill()
    }

    /// Lists the names of the files and sockets in the guest's folder.
    ///
    /// # Errors
    ///
    /// Fails if the folder cannot be listed.
    pub fn files(&self) -> Result<Vec<String>> {
        self.scratch.contents()
    }

    /// Returns the output of all processes of the guest.
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
        // A guest that still answers may have logged more than its console shows.
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

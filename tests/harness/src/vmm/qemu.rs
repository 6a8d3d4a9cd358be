// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU from the Debian root file system.
//!
//! QEMU runs outside that root file system, through its dynamic linker, so that QEMU's sockets, files and process ids
//! are the host's.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use guest_agent::protocol::{PORT_NAME, PORT_VARIABLE};
use serde_json::{json, Map, Value};

use super::hardware::Hardware;
use super::{socket_pair, Attachment, StartedVmm, VmConfig};
use crate::host::{time_stamp_counter_khz, Accelerator};
use crate::process::{Process, Streams};

const AGENT_FD: i32 = 3;
const MONITOR_FD: i32 = 4;

/// The id of the balloon device in QEMU.
pub const BALLOON_ID: &str = "balloon0";
/// The id of the chardev that connects QEMU to a vhost-user device.
pub const CHARDEV: &str = "balloon";
/// The id of the hot-plug slot for the balloon.
pub const SLOT: &str = "slot0";

/// The processor that TCG emulates. TCG executes `rep movsb` byte by byte. Without these features
/// Linux copies words.
const TCG_CPU: &str = "max,-erms,-fsrm";
/// The longest times of the kernel's watchdogs: for a locked-up processor (twice this), and for RCU.
const WATCHDOGS: &str = "watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=300";

/// Returns the frequency of the guest's time stamp counter if TCG passes the host's on.
///
/// The guest's kernel measures the frequency at boot, by other clocks. On a host that was busy enough it was wrong by a
/// factor of thirty: the guest's time ran too fast, and its time limits were too short.
fn guest_clock_khz(hardware: &Hardware) -> Option<u64> {
    let counts_instructions = hardware.arguments.iter().any(|it| it == "-icount");
    if Accelerator::detect() == Accelerator::Kvm || counts_instructions {
        return None;
    }
    time_stamp_counter_khz()
}

/// Starts QEMU with `kernel`.
///
/// # Errors
///
/// Fails if QEMU cannot be started.
pub fn start(rootfs: &Path, kernel: &Path, config: &VmConfig) -> Result<StartedVmm> {
    let (agent, agent_far) = socket_pair()?;
    let (monitor, monitor_far) = socket_pair()?;
    let mut command = program(rootfs);
    let hardware = &config.hardware;
    command.args(["-no-user-config", "-display", "none"]);
    if !hardware.default_devices {
        command.arg("-nodefaults");
    }
    if !hardware.allow_reboot {
        command.arg("-no-reboot");
    }
    command.args(match Accelerator::detect() {
        Accelerator::Kvm => ["-accel", "kvm", "-cpu", "max"],
        // With a thread for each processor, TCG can execute an `int3` that the guest has already
        // replaced: Linux patches its code with it, and then stops with "Oops: int3".
        Accelerator::Tcg if hardware.processors() > 1 => {
            ["-accel", "tcg,thread=single", "-cpu", TCG_CPU]
        }
        Accelerator::Tcg => ["-accel", "tcg", "-cpu", TCG_CPU],
    });
    command.args(["-machine", &hardware.machine_argument()]);
    command.args(hardware.memory_arguments(config.memory, config.memory_file.as_deref()));
    if config.incoming {
        command.args(["-incoming", "defer"]);
    }
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&config.initramfs);
    let quiet = if config.console == Streams::Terminal {
        " quiet"
    } else {
        ""
    };
    let port = if config.suspendable {
        format!(" {PORT_VARIABLE}=/dev/ttyS1")
    } else {
        String::new()
    };
    let clock = match guest_clock_khz(hardware) {
        Some(khz) => format!("tsc_early_khz={khz} tsc=reliable "),
        None => String::new(),
    };
    // no_timer_check: at boot, the kernel counts timer interrupts for a moment, and panics if the emulator is slow on a
    // busy host. cryptomgr.notests: the crypto self-tests take a third of an emulated boot. The watchdogs of the kernel
    // are as patient as they can be: on a busy host an emulated processor may not run for half a minute.
    command.args([
        "-append",
        &format!(
            "console=ttyS0 panic=-1 no_timer_check {clock}cryptomgr.notests {WATCHDOGS} loglevel=5{quiet}{port} {}",
            config.kernel_arguments
        ),
    ]);
    match config.console {
        Streams::Collected => command.args(["-chardev", "stdio,id=console"]),
        Streams::Terminal => command.args(["-chardev", "stdio,id=console,signal=off"]),
    };
    command.args(["-serial", "chardev:console"]);
    command.args(["-chardev", &format!("socket,id=agent,fd={AGENT_FD}")]);
    if config.suspendable {
        command.args(["-serial", "chardev:agent"]);
    } else {
        let port = format!("virtserialport,chardev=agent,name={PORT_NAME}");
        command.args(["-device", "virtio-serial-pci", "-device", &port]);
    }
    command.args(["-chardev", &format!("socket,id=monitor,fd={MONITOR_FD}")]);
    command.args(["-object", "monitor-qmp,id=qmp,chardev=monitor"]);
    if let Some(socket) = &config.qmp_socket {
        command.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", socket.display()),
        ]);
    }
    attach(&mut command, config);
    command.args(&hardware.arguments);
    command
        .fd_mappings(vec![
            FdMapping {
                parent_fd: agent_far,
                child_fd: AGENT_FD,
            },
            FdMapping {
                parent_fd: monitor_far,
                child_fd: MONITOR_FD,
            },
        ])
        .context("cannot pass sockets to QEMU")?;
    let process = Process::start("qemu", command, config.console)?;
    Ok(StartedVmm {
        process,
        agent,
        monitor: Some(monitor),
    })
}

/// Returns the command that runs QEMU, without arguments for the machine.
#[must_use]
pub fn program(rootfs: &Path) -> Command {
    let mut command = Command::new(rootfs.join("lib64/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(rootfs.join("usr/lib/x86_64-linux-gnu"));
    command
        .args(["--argv0", "qemu-system-x86_64"])
        .arg(rootfs.join("usr/bin/qemu-system-x86_64"));
    command.env(
        "QEMU_MODULE_DIR",
        rootfs.join("usr/lib/x86_64-linux-gnu/qemu"),
    );
    for folder in ["qemu", "seabios"] {
        command.arg("-L").arg(rootfs.join("usr/share").join(folder));
    }
    command
}

fn attach(command: &mut Command, config: &VmConfig) {
    command.args(["-object", "iothread,id=io0"]);
    if config.hotplug_slot {
        command.args([
            "-device",
            &format!("pcie-root-port,id={SLOT},chassis=1,io-reserve=4096"),
        ]);
    }
    if let Attachment::VhostUser(socket) = &config.device {
        command.args([
            "-chardev",
            &format!("socket,id={CHARDEV},path={}", socket.display()),
        ]);
    }
    if let Some(device) =
        balloon_properties(&config.device, config.hotplug_slot, &config.properties)
    {
        command.args(["-device", &device.to_string()]);
    }
}

/// Parses properties of a device (`a=b`) into the JSON types that QEMU expects.
#[must_use]
pub fn properties(options: &[&str]) -> Map<String, Value> {
    let typed = |(name, value): (&str, &str)| {
        let value = match value {
            // The property has a third value, `auto`, so it is not a boolean.
            "on" | "off" if name == "disable-legacy" => value.into(),
            "on" => true.into(),
            "off" => false.into(),
            _ => value
                .parse::<u64>()
                .map_or_else(|_| value.into(), Value::from),
        };
        (name.to_owned(), value)
    };
    let pairs = options.iter().filter_map(|option| option.split_once('='));
    pairs.map(typed).collect()
}

/// Returns the properties of a balloon device for QEMU's `-device` and `device_add`. `properties` apply only to a
/// vhost-user device. Returns `None` without a device.
#[must_use]
pub fn balloon_properties(
    device: &Attachment,
    hotplug_slot: bool,
    properties: &Map<String, Value>,
) -> Option<Value> {
    let mut value = match device {
        Attachment::None => return None,
        Attachment::VhostUser(_) => json!({
            "driver": "vhost-user-test-device-pci", "chardev": CHARDEV,
            "virtio-id": 5, "num_vqs": 5, "vq_size": 128, "config_size": 16,
        }),
        Attachment::QemuOwn(_) => json!({
            "driver": "virtio-balloon-pci", "free-page-hint": true, "iothread": "io0",
        }),
    };
    let all = value.as_object_mut()?;
    all.insert("id".into(), BALLOON_ID.into());
    if hotplug_slot {
        all.insert("bus".into(), SLOT.into());
    }
    all.extend(match device {
        Attachment::QemuOwn(properties) => properties.clone(),
        _ => properties.clone(),
    });
    Some(value)
}

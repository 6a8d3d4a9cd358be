// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! QEMU, taken from the Debian root file system but run outside it: through that system's own dynamic linker, so that
//! its sockets, files and process numbers are the host's.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use guest_agent::protocol::PORT_NAME;

use super::{line, Attachment, Machine, Started};
use crate::host::Accelerator;
use crate::process::{Process, Streams};

const AGENT_FD: i32 = 3;
const MONITOR_FD: i32 = 4;

/// The device id under which QEMU knows the balloon.
pub const BALLOON_ID: &str = "balloon0";

/// Starts QEMU with `kernel`.
///
/// # Errors
///
/// If it cannot be started.
pub fn start(rootfs: &Path, kernel: &Path, machine: &Machine) -> Result<Started> {
    let (agent, agent_far) = line()?;
    let (monitor, monitor_far) = line()?;
    let mut command = program(rootfs);
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-cpu",
        "max",
    ]);
    command.args([
        "-accel",
        if Accelerator::choose() == Accelerator::Kvm {
            "kvm"
        } else {
            "tcg"
        },
    ]);
    command.args(["-machine", "q35,memory-backend=mem"]);
    command.args([
        "-object",
        &format!(
            "memory-backend-memfd,id=mem,size={},share=on",
            machine.memory
        ),
    ]);
    command.args(["-m", &format!("{}M", machine.memory / crate::MIB)]);
    command
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(&machine.initramfs);
    let quiet = if machine.console == Streams::Terminal {
        " quiet"
    } else {
        ""
    };
    command.args([
        "-append",
        &format!(
            "console=ttyS0 panic=-1 loglevel=5{quiet} {}",
            machine.kernel_arguments
        ),
    ]);
    match machine.console {
        Streams::Collected => command.args(["-chardev", "stdio,id=console"]),
        Streams::Terminal => command.args(["-chardev", "stdio,id=console,signal=off"]),
    };
    command.args(["-serial", "chardev:console", "-device", "virtio-serial-pci"]);
    command.args(["-chardev", &format!("socket,id=agent,fd={AGENT_FD}")]);
    command.args([
        "-device",
        &format!("virtserialport,chardev=agent,name={PORT_NAME}"),
    ]);
    command.args(["-chardev", &format!("socket,id=monitor,fd={MONITOR_FD}")]);
    command.args(["-object", "monitor-qmp,id=qmp,chardev=monitor"]);
    attach(&mut command, &machine.device);
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
    let process = Process::start("qemu", command, machine.console)?;
    Ok(Started {
        process,
        agent,
        monitor: Some(monitor),
    })
}

/// The command that runs QEMU, without arguments of its own.
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

fn attach(command: &mut Command, device: &Attachment) {
    match device {
        Attachment::None => {}
        Attachment::VhostUser(socket) => {
            command.args([
                "-chardev",
                &format!("socket,id=balloon,path={}", socket.display()),
            ]);
            let numbers = "virtio-id=5,num_vqs=5,vq_size=128,config_size=16";
            command.args([
                "-device",
                &format!("vhost-user-test-device-pci,id={BALLOON_ID},chardev=balloon,{numbers}"),
            ]);
        }
        Attachment::QemuOwn(properties) => {
            command.args(["-object", "iothread,id=io0"]);
            let hinting = "free-page-hint=on,iothread=io0";
            let separator = if properties.is_empty() { "" } else { "," };
            command.args([
                "-device",
                &format!("virtio-balloon-pci,id={BALLOON_ID},{hinting}{separator}{properties}"),
            ]);
        }
    }
}

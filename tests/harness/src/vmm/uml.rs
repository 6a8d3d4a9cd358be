// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! User-mode Linux, where the kernel is the program.

use std::path::Path;
use std::process::Command;

use anyhow::{bail, Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use guest_agent::protocol::PORT_VARIABLE;

use super::{socket_pair, Attachment, StartedVmm, VmConfig};
use crate::host::memory_folder;
use crate::process::{Process, Streams};

const AGENT_FD: i32 = 3;
const TWO_PROCESSORS: &str = "ncpus=2";

/// The name of the folder that user-mode Linux creates beside its initramfs. The folder stays if user-mode Linux is
/// killed.
pub const FOLDER: &str = "user-mode-linux";

/// The arguments of the usual kernel: seccomp instead of ptrace, which halves the cost of a page fault.
pub const USUAL_ARGUMENTS: [&str; 1] = ["seccomp=on"];
/// The argument that makes the usual kernel use ptrace.
pub const TRACES: &str = "seccomp=off";

/// The arguments of the debug kernel.
///
/// - Two processors, which need seccomp.
/// - All processes on the first processor, see [`ONE_PROCESSOR_VARIABLE`].
/// - No stack traces of slab allocations, which in user-mode Linux take ten times as long as the allocation.
/// - Short grace periods of RCU. Otherwise most of the time of a load cycle is spent waiting for them.
///
/// [`ONE_PROCESSOR_VARIABLE`]: guest_agent::protocol::ONE_PROCESSOR_VARIABLE
pub const DEBUG_ARGUMENTS: [&str; 5] = [
    TWO_PROCESSORS,
    "seccomp=on",
    "AGENT_ONE_PROCESSOR=1",
    "slab_debug=FZP",
    "rcupdate.rcu_expedited=1",
];

/// Starts `kernel` with `arguments` and the arguments of `config` on its command line.
///
/// # Errors
///
/// Fails if user-mode Linux cannot be started, or `config` has QEMU's device.
pub fn start(kernel: &Path, arguments: &[&str], config: &VmConfig) -> Result<StartedVmm> {
    let (agent, agent_far) = socket_pair()?;
    let mut command = Command::new(kernel);
    // Guest memory is a file in this folder, and the balloon punches holes in it.
    command.env("TMPDIR", memory_folder(config.memory));
    command.arg(format!("mem={}M", config.memory / crate::MIB));
    command.arg(format!("initrd={}", config.initramfs.display()));
    let folder = config
        .initramfs
        .parent()
        .context("the initramfs has no folder")?;
    command.arg(format!("uml_dir={}/", folder.display()));
    command.arg(format!("umid={FOLDER}"));
    command.args(["con=null", "ssl=null", "panic=-1"]);
    command.args(match config.console {
        Streams::Terminal => ["con0=fd:0,fd:1", "loglevel=1"],
        Streams::Collected => ["con0=null,fd:1", "loglevel=5"],
    });
    command
        .arg(format!("ssl0=fd:{AGENT_FD}"))
        .arg(format!("{PORT_VARIABLE}=/dev/ttyS0"));
    // Otherwise KUnit runs a module's tests whenever the module is loaded. Later arguments can enable KUnit again.
    command.arg("kunit.enable=0");
    command.args(arguments);
    command.args(config.kernel_arguments.split_whitespace());
    match &config.device {
        Attachment::None => {}
        Attachment::VhostUser(socket) => {
            command.arg(format!("virtio_uml.device={}:5", socket.display()));
        }
        Attachment::QemuOwn(_) => bail!("user-mode Linux does not have QEMU's device"),
    }
    let agent_far = FdMapping {
        parent_fd: agent_far,
        child_fd: AGENT_FD,
    };
    command
        .fd_mappings(vec![agent_far])
        .context("cannot pass a socket to user-mode Linux")?;
    let mut process = Process::start("user-mode linux", command, config.console)?;
    if !arguments.contains(&TWO_PROCESSORS) {
        process.pin_to_one_cpu()?;
    }
    Ok(StartedVmm {
        process,
        agent,
        monitor: None,
    })
}

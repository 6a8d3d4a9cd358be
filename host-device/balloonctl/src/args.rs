// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use crate::size;

const EXAMPLES: &str = "\
Examples:
  export BALLOONCTL_QMP=/tmp/b.qmp            # the --qmp-socket of the daemon
  balloonctl status
  balloonctl target 2G --wait 30              # the guest keeps 2 GiB; the rest goes into the balloon
  balloonctl hint start; balloonctl hint status; balloonctl hint done

  To migrate the memory of a guest, start the receiver at the destination, then the migration at the source:
    balloonctl receive --listen unix:/tmp/ram.sock --memory-file /dev/shm/there
    balloonctl migrate --to unix:/tmp/ram.sock --vmm-qmp /tmp/source.qmp

  To migrate a whole guest from one QEMU to another, see balloonctl migrate-vm --help.

Results are written to standard output (with --json as one JSON value), progress and errors to standard error.

Exit status:
  0  The command succeeded.
  1  The command was refused or failed. Completed steps were undone.
  2  The command line is wrong.
  3  The connection to a QMP socket failed or was lost.
  4  The command was cancelled by Ctrl-C (SIGINT), SIGTERM or SIGHUP.
  5  The command exceeded its time limit, or a QMP server did not answer within --timeout.
  6  The received memory is incomplete. The incomplete marker remains beside the memory file.
  7  A step could not be undone, or the state of the destination is unknown. The message says what to check.";

const MIGRATE_EXAMPLES: &str = "\
Start the receiver first (balloonctl receive), unless the address is a file.
Without --vmm-qmp, the processes that map guest memory are stopped for the last iteration.
Ctrl-C cancels the migration: the guest continues to run and gets its hinted pages back. A second Ctrl-C exits at once.
Options of this command apply to this migration only. The daemon keeps what migrate-set-parameters has set over QMP.

Examples:
  balloonctl migrate --to unix:/tmp/ram.sock --vmm-qmp /tmp/source.qmp
  balloonctl migrate --to tcp:192.0.2.7:4444 --max-bandwidth 100M --downtime-limit 200
  balloonctl migrate --to file:/backup/guest.ram --compress zstd --channels 1
  balloonctl migrate --to unix:/tmp/ram.sock --no-hints         # to measure what hints save
  balloonctl --json migrate --to unix:/tmp/ram.sock | jq .ram.transferred";

const RECEIVE_EXAMPLES: &str = "\
The file is written in place, so a waiting VMM may have mapped it already (QEMU: -incoming defer). Zero pages and
pages skipped by hints take no space in it. The marker FILE.incomplete exists from the start of the receiver until the
stream has been checked. Never start a guest from a memory file that has a marker.

Examples:
  balloonctl receive --listen unix:/tmp/ram.sock --memory-file /dev/shm/there
  balloonctl receive --listen tcp:0.0.0.0:4444 --memory-file ram0=/dev/shm/low --memory-file ram1=/dev/shm/high
  balloonctl receive --listen file:/backup/guest.ram --memory-file /dev/shm/again";

const MIGRATE_VM_EXAMPLES: &str = "\
The daemon sends memory while the guest runs. When the rest fits the downtime, the balloon is unplugged, the guest is
paused, and the daemon sends the rest. QEMU migrates the state of its devices. The balloon is plugged in at the
destination, and the guest resumes there. --dry-run prints every step with its command.
If a step fails before the guest runs at the destination, or at Ctrl-C, the guest continues at the source with its
balloon. A second process does the same if this one is killed.

Both QEMUs need the same machine and memory in a shared file. The destination needs an empty slot for the balloon:
  -object memory-backend-file,id=mem,size=2G,mem-path=FILE,share=on -machine q35,memory-backend=mem
  -device pcie-root-port,id=slot0,chassis=1

Example on one host. Start the guest with its balloon:
  vhost-device-balloon --persistent --free-page-hint --socket-path /tmp/b1 --qmp-socket /tmp/b1.qmp &
  qemu-system-x86_64 ... MACHINE with mem-path=/dev/shm/here ... -qmp unix:/tmp/q1.qmp,server,nowait \\
    -chardev socket,id=balloon,path=/tmp/b1 -device vhost-user-test-device-pci,id=balloon0,bus=slot0,\\
chardev=balloon,virtio-id=5,num_vqs=5,vq_size=128,config_size=16

Start the destination, which waits:
  qemu-system-x86_64 ... MACHINE with mem-path=/dev/shm/there ... -qmp unix:/tmp/q2.qmp,server,nowait -incoming defer &
  balloonctl receive --listen unix:/tmp/ram.sock --memory-file /dev/shm/there &

Migrate the guest:
  balloonctl --qmp /tmp/b1.qmp migrate-vm --source-qmp /tmp/q1.qmp --destination-qmp /tmp/q2.qmp \\
    --to unix:/tmp/ram.sock --device-socket /tmp/b2 --device-state /tmp/b2.state --device-command \\
    'vhost-device-balloon --free-page-hint --socket-path /tmp/b2 --qmp-socket /tmp/b2.qmp --device-state /tmp/b2.state'";

/// Controls vhost-device-balloon: the balloon, free page hinting, and live migrations that skip free pages.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub struct Args {
    /// Path of the QMP socket of the daemon (its --qmp-socket).
    #[arg(long, global = true, env = "BALLOONCTL_QMP", value_name = "PATH")]
    pub qmp: Option<PathBuf>,

    /// Timeout for connecting to a QMP socket, and for each answer, in seconds.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,

    /// Print the result as one JSON value, and a failure as {"error": {"exit-status": N, "desc": "..."}}.
    #[arg(long, global = true)]
    pub json: bool,

    /// The command to execute.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show the balloon, its driver, the host memory of the guest, hinting and the last migration.
    Status,
    /// Set how much memory the guest keeps. The rest goes into the balloon.
    Target(Target),
    /// Control hint rounds of free page hinting manually.
    #[command(subcommand)]
    Hint(Hint),
    /// Stop or resume the release of guest memory to the host.
    #[command(subcommand)]
    Discard(Discard),
    /// Send guest memory to a receiver while the guest runs, and pause the guest for the last iteration.
    #[command(after_help = MIGRATE_EXAMPLES)]
    Migrate(Box<Migrate>),
    /// Cancel the current migration. The guest continues to run and gets its hinted pages back.
    MigrateCancel,
    /// Receive guest memory into files.
    #[command(after_help = RECEIVE_EXAMPLES)]
    Receive(Receive),
    /// Migrate a whole guest from one QEMU to another while it runs.
    #[command(after_help = MIGRATE_VM_EXAMPLES)]
    MigrateVm(Box<MigrateVm>),
}

/// The options of `target`.
#[derive(Clone, Debug, ClapArgs)]
#[command(after_help = "Examples:\n  balloonctl target 2G\n  balloonctl target 768M --wait 30")]
pub struct Target {
    /// Memory that the guest keeps: 2G, 1.5G, 512M, or a number of bytes from 1048576. Units are powers of 1024.
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    pub memory: u64,

    /// Wait until the guest has reached the target, at most this number of seconds.
    #[arg(long, value_name = "SECONDS")]
    pub wait: Option<u64>,
}

/// What `hint` does.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Hint {
    /// Mark all memory dirty, and start a hint round with a new command id.
    Start,
    /// Stop the hint round. The guest keeps its hinted blocks.
    Stop,
    /// Tell the guest to release its hinted blocks.
    Done,
    /// Show the state of the hint round.
    Status,
}

/// What `discard` does.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Discard {
    /// Release no memory: before a snapshot or a post-copy migration by the VMM, or before a device is assigned.
    Inhibit,
    /// Release memory again. This does not overrule a device that pins memory.
    Allow,
    /// Show whether memory is released, and what inhibits it.
    Status,
}

/// How writes to memory are noticed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Tracking {
    /// Soft-dirty bits if the kernel supports them, or else content hashes.
    Auto,
    /// Soft-dirty bits of the host kernel.
    SoftDirty,
    /// Hashes of the pages that were sent.
    Content,
}

/// How pages are compressed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Compression {
    /// No compression.
    None,
    /// Compression with zstd.
    Zstd,
}

/// How memory is sent by this migration; a value that is not given is that of the daemon.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct MigrationParameters {
    /// Limit of the bandwidth, in bytes per second: 100M, 1G. 0 means no limit, as the daemon has it by default.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub max_bandwidth: Option<u64>,

    /// How long the guest may be paused for the last iteration, in milliseconds. Default of the daemon: 300.
    #[arg(long, value_name = "MS")]
    pub downtime_limit: Option<u64>,

    /// Number of connections to the receiver, from 1 to 64. Default of the daemon: 1.
    #[arg(long, value_name = "N")]
    pub channels: Option<u8>,

    /// Compression of pages. Default of the daemon: none.
    #[arg(long, value_name = "HOW")]
    pub compress: Option<Compression>,

    /// Compression level of zstd, from 1 to 20. Default of the daemon: 1.
    #[arg(long, value_name = "LEVEL")]
    pub zstd_level: Option<u8>,

    /// Maximum number of iterations. The guest is then paused, however much memory remains. Default of the
    /// daemon: 10.
    #[arg(long, value_name = "N")]
    pub max_rounds: Option<u32>,

    /// Do not use free page hints of the guest.
    #[arg(long)]
    pub no_hints: bool,

    /// How long the migration waits for hints, in total over all iterations, in milliseconds. Default of the daemon:
    /// 2000.
    #[arg(long, value_name = "MS")]
    pub hint_wait: Option<u64>,

    /// How writes of the guest are tracked. Default of the daemon: auto.
    #[arg(long, value_name = "HOW")]
    pub tracking: Option<Tracking>,

    /// Compare all memory with the sent pages while the guest is paused, and resend pages that differ. This is slow.
    #[arg(long)]
    pub verify: bool,
}

/// The options of `migrate`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Migrate {
    /// Address of the receiver: unix:PATH, tcp:HOST:PORT or file:PATH.
    #[arg(long, value_name = "URI")]
    pub to: String,

    /// QMP socket of the VMM, to pause the guest. Without it, the processes that map guest memory are stopped.
    #[arg(long, value_name = "PATH")]
    pub vmm_qmp: Option<PathBuf>,

    /// How memory is sent.
    #[command(flatten)]
    pub migration_parameters: MigrationParameters,

    /// Start the migration, and do not wait for its end.
    #[arg(long)]
    pub detach: bool,
}

/// The options of `receive`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Receive {
    /// Address to listen on: unix:PATH or tcp:HOST:PORT. With file:PATH, the stream is read from that file.
    #[arg(long, value_name = "URI")]
    pub listen: String,

    /// Memory file of the RAM block NAME. NAME may be omitted if there is only one RAM block.
    #[arg(long, value_name = "[NAME=]PATH", required = true)]
    pub memory_file: Vec<String>,
}

/// The options of `migrate-vm`.
#[derive(Clone, Debug, ClapArgs)]
pub struct MigrateVm {
    /// Path of the QMP socket of the source QEMU, which runs the guest.
    #[arg(long, value_name = "PATH")]
    pub source_qmp: PathBuf,

    /// Path of the QMP socket of the destination QEMU, which waits for the guest (-incoming defer).
    #[arg(long, value_name = "PATH")]
    pub destination_qmp: PathBuf,

    /// Address of the receiver of guest memory: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "URI")]
    pub to: String,

    /// Id of the balloon device at the source. The device has the same id at the destination.
    #[arg(long, value_name = "ID", default_value = "balloon0")]
    pub device: String,

    /// Id of the bus for the balloon at the destination. Default: the id of its bus at the source.
    #[arg(long, value_name = "ID")]
    pub bus: Option<String>,

    /// Path of the vhost-user socket of the destination daemon. It need not exist when the migration starts.
    #[arg(long, value_name = "PATH")]
    pub device_socket: PathBuf,

    /// Path of the vhost-user socket of the source daemon. Default: the path that QEMU reports.
    #[arg(long, value_name = "PATH")]
    pub source_device_socket: Option<PathBuf>,

    /// Write the state of the balloon device to this file, for the destination daemon (its --device-state).
    #[arg(long, value_name = "FILE")]
    pub device_state: Option<PathBuf>,

    /// Shell command that starts the destination daemon, run after the device state is written. Default: none.
    ///
    /// If it fails, the end of its standard error is shown. Redirect the output of the daemon to a file to keep it.
    #[arg(long, value_name = "COMMAND")]
    pub device_command: Option<String>,

    /// URI for QEMU's own migration, as QEMU's migrate command expects it. Default: a temporary file on this host.
    #[arg(long, value_name = "URI")]
    pub vm_state: Option<String>,

    /// How memory is sent.
    #[command(flatten)]
    pub migration_parameters: MigrationParameters,

    /// Timeout of a single step, in seconds. It does not apply to the iterations of the memory migration.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub step_limit: u64,

    /// Quit the source QEMU once the guest runs at the destination. Without it, the source remains paused.
    #[arg(long)]
    pub quit_source: bool,

    /// Check the preconditions and print the plan, without executing it.
    #[arg(long)]
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// `docs/commands.md` is the reference page.
    #[test]
    fn the_reference_page_has_every_option() {
        let page = include_str!("../../../docs/commands.md");
        let words: Vec<_> = page
            .split(|character: char| !character.is_ascii_alphanumeric() && character != '-')
            .collect();
        let command = Args::command();
        let commands: Vec<_> = command.get_subcommands().collect();
        let arguments = commands.iter().flat_map(|it| it.get_arguments());
        let options = arguments
            .chain(command.get_arguments())
            .filter_map(|it| it.get_long())
            .map(|name| format!("--{name}"))
            .filter(|name| !words.contains(&name.as_str()));
        let names = commands
            .iter()
            .map(|it| format!("`{}", it.get_name()))
            .filter(|name| !page.contains(name));
        let missing: Vec<_> = options.chain(names).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn options_may_stand_behind_the_command() {
        let args = ["balloonctl", "target", "1.5G", "--qmp", "s", "--json"];
        let args = Args::try_parse_from(args).unwrap();
        assert!(args.json && args.qmp == Some("s".into()));
        assert!(matches!(args.command, Command::Target(target) if target.memory == 3 << 29));
        assert!(Args::try_parse_from(["balloonctl", "target", "much"]).is_err());
        assert!(Args::try_parse_from(["balloonctl", "receive", "--listen", "x"]).is_err());
    }
}

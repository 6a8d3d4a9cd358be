// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use crate::size;

const EXAMPLES: &str = "\
Examples:
  export BALLOONCTL_QMP=/tmp/b.qmp            # what vhost-device-balloon was given as --qmp-socket
  balloonctl status
  balloonctl target 2G --wait 30              # the guest shall have 2 GiB; the rest goes into the balloon
  balloonctl hint start; balloonctl hint status; balloonctl hint done

  Moving a guest's memory, live. First at the destination, then at the source:
    balloonctl receive --listen unix:/tmp/ram.sock --memory-file /dev/shm/there
    balloonctl migrate --to unix:/tmp/ram.sock --vmm-qmp /tmp/source.qmp

  Moving a whole guest from one QEMU to another: see balloonctl migrate-vm --help.

Results go to standard output (with --json as one JSON value), progress and errors to standard error.

Exit status:
  0  done
  1  refused, or failed; what was begun is undone
  2  the command line is wrong
  3  no connection to a QMP socket, or it was lost
  4  cancelled by Ctrl-C (SIGINT), SIGTERM or SIGHUP
  5  not done within the time limit that was given
  6  what was received is incomplete: the memory file's marker is left beside it
  7  something could not be undone, and wants looking at; the message says what";

const MIGRATE_EXAMPLES: &str = "\
The receiver (balloonctl receive, or a QEMU's worth of your own) must listen already, unless the address is a file.
Without --vmm-qmp the processes that map the guest's memory are stopped for the last round.
Ctrl-C cancels: the guest runs on, and has its pages back. A second Ctrl-C leaves without waiting for that.

Examples:
  balloonctl migrate --to unix:/tmp/ram.sock --vmm-qmp /tmp/source.qmp
  balloonctl migrate --to tcp:192.0.2.7:4444 --max-bandwidth 100M --downtime-limit 200
  balloonctl migrate --to file:/backup/guest.ram --compress zstd --channels 1
  balloonctl migrate --to unix:/tmp/ram.sock --no-hints         # to see what hints spare
  balloonctl --json migrate --to unix:/tmp/ram.sock | jq .ram.transferred";

const RECEIVE_EXAMPLES: &str = "\
The file is written in place, so a VMM may have it mapped and wait (QEMU: -incoming defer). Pages that are zero, or
that the guest held free, take no space in it. From before the first byte until the stream has ended well there is a
marker beside it, FILE.incomplete: never start a guest from memory that has one.

Examples:
  balloonctl receive --listen unix:/tmp/ram.sock --memory-file /dev/shm/there
  balloonctl receive --listen tcp:0.0.0.0:4444 --memory-file ram0=/dev/shm/low --memory-file ram1=/dev/shm/high
  balloonctl receive --listen file:/backup/guest.ram --memory-file /dev/shm/again";

const MIGRATE_VM_EXAMPLES: &str = "\
What it does, step by step, is shown by --dry-run with every command. In short: our daemon sends memory while the guest
runs; when the rest fits the downtime, the balloon is unplugged, the guest is stopped, and the daemon sends the rest;
QEMU moves the state of its devices; the balloon is plugged in at the destination; the guest goes on there.
If anything fails before the destination runs, or at Ctrl-C, the guest goes on at the source, with its balloon.

Both QEMUs have the same machine, memory in a shared file, and an empty slot for the balloon at the destination:
  -object memory-backend-file,id=mem,size=2G,mem-path=FILE,share=on -machine q35,memory-backend=mem
  -device pcie-root-port,id=slot0,chassis=1

Example, with everything on one host. The guest, and its balloon:
  vhost-device-balloon --persistent --free-page-hint --socket-path /tmp/b1 --qmp-socket /tmp/b1.qmp &
  qemu-system-x86_64 ... MACHINE with mem-path=/dev/shm/here ... -qmp unix:/tmp/q1.qmp,server,nowait \\
    -chardev socket,id=balloon,path=/tmp/b1 -device vhost-user-test-device-pci,id=balloon0,bus=slot0,\\
chardev=balloon,virtio-id=5,num_vqs=5,vq_size=128,config_size=16

The destination waits:
  qemu-system-x86_64 ... MACHINE with mem-path=/dev/shm/there ... -qmp unix:/tmp/q2.qmp,server,nowait -incoming defer &
  balloonctl receive --listen unix:/tmp/ram.sock --memory-file /dev/shm/there &

And it is moved:
  balloonctl --qmp /tmp/b1.qmp migrate-vm --source-qmp /tmp/q1.qmp --destination-qmp /tmp/q2.qmp \\
    --to unix:/tmp/ram.sock --device-socket /tmp/b2 --device-state /tmp/b2.state --device-command \\
    'vhost-device-balloon --free-page-hint --socket-path /tmp/b2 --qmp-socket /tmp/b2.qmp --device-state /tmp/b2.state'";

/// Commands vhost-device-balloon: the balloon, hints about free pages, and migrations that skip these.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub struct Args {
    /// The daemon's QMP socket: its --qmp-socket.
    #[arg(long, global = true, env = "BALLOONCTL_QMP", value_name = "PATH")]
    pub qmp: Option<PathBuf>,

    /// Print the result as one JSON value; a failure as {"error": {"exit-status": N, "desc": "..."}}.
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show the balloon, its driver, the guest's memory on the host, hints and the last migration.
    Status,
    /// Set how much memory the guest shall have; the rest goes into the balloon.
    Target(Target),
    /// Rounds of free page hinting by hand.
    #[command(subcommand)]
    Hint(Hint),
    /// Send the guest's memory elsewhere while it runs, and pause it for the last of it.
    #[command(after_help = MIGRATE_EXAMPLES)]
    Migrate(Box<Migrate>),
    /// Cancel the migration that runs. The guest runs on, and has its pages back.
    MigrateCancel,
    /// Receive a guest's memory into files.
    #[command(after_help = RECEIVE_EXAMPLES)]
    Receive(Receive),
    /// Move a whole guest from one QEMU to another while it runs.
    #[command(after_help = MIGRATE_VM_EXAMPLES)]
    MigrateVm(Box<MigrateVm>),
}

/// The options of `target`.
#[derive(Clone, Debug, ClapArgs)]
#[command(after_help = "Examples:\n  balloonctl target 2G\n  balloonctl target 768M --wait 30")]
pub struct Target {
    /// The guest's memory: 2G, 1.5G, 512M, or bytes.
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    pub memory: u64,

    /// Wait until the guest has it, for so many seconds at most.
    #[arg(long, value_name = "SECONDS")]
    pub wait: Option<u64>,
}

/// What `hint` does.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Hint {
    /// Mark all memory dirty, and ask the guest for its free pages under a new id.
    Start,
    /// Want no more hints; the guest keeps what it has hinted.
    Stop,
    /// Tell the guest to take its hinted pages back.
    Done,
    /// Show how the round stands.
    Status,
}

/// How writes to memory are noticed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Tracking {
    /// Whichever is sound here, the cheaper one first.
    Auto,
    /// The host kernel's soft-dirty bits.
    SoftDirty,
    /// Hashes of pages as they were sent.
    Content,
}

/// How pages are compressed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Compression {
    /// Not at all.
    None,
    /// With zstd.
    Zstd,
}

/// How memory is sent; a value that is not given stays as the daemon has it.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct MigrationParameters {
    /// The most bytes a second, with suffix; 0 for no limit.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub max_bandwidth: Option<u64>,

    /// How long the guest may be paused, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub downtime_limit: Option<u64>,

    /// How many connections to send over.
    #[arg(long, value_name = "N")]
    pub channels: Option<u8>,

    /// Compress pages.
    #[arg(long, value_name = "HOW")]
    pub compress: Option<Compression>,

    /// How hard zstd tries: 1 to 20.
    #[arg(long, value_name = "LEVEL")]
    pub zstd_level: Option<u8>,

    /// The most rounds before the guest is paused, whatever is left.
    #[arg(long, value_name = "N")]
    pub max_rounds: Option<u32>,

    /// Do not ask the guest for its free pages.
    #[arg(long)]
    pub no_hints: bool,

    /// The longest to wait for the guest's hints in a round, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub hint_wait: Option<u64>,

    /// How writes of the guest are noticed.
    #[arg(long, value_name = "HOW")]
    pub tracking: Option<Tracking>,

    /// Compare all of memory with what was sent while the guest is paused, and send what differs. Slow.
    #[arg(long)]
    pub verify: bool,
}

/// The options of `migrate`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Migrate {
    /// Where to: unix:PATH, tcp:HOST:PORT, file:PATH.
    #[arg(long, value_name = "URI")]
    pub to: String,

    /// The VMM's QMP socket, to pause the guest through. Without it, its processes are stopped.
    #[arg(long, value_name = "PATH")]
    pub vmm_qmp: Option<PathBuf>,

    /// How memory is sent.
    #[command(flatten)]
    pub migration_parameters: MigrationParameters,

    /// Begin, and do not wait for the end.
    #[arg(long)]
    pub detach: bool,
}

/// The options of `receive`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Receive {
    /// Where to listen: unix:PATH, tcp:HOST:PORT; or file:PATH to read from.
    #[arg(long, value_name = "URI")]
    pub listen: String,

    /// Where memory goes. With NAME, the block of that name; without, the only block there is.
    #[arg(long, value_name = "[NAME=]PATH", required = true)]
    pub memory_file: Vec<String>,
}

/// The options of `migrate-vm`.
#[derive(Clone, Debug, ClapArgs)]
pub struct MigrateVm {
    /// The QMP socket of the QEMU that runs the guest.
    #[arg(long, value_name = "PATH")]
    pub source_qmp: PathBuf,

    /// The QMP socket of the QEMU that waits for it (-incoming defer).
    #[arg(long, value_name = "PATH")]
    pub destination_qmp: PathBuf,

    /// Where memory is received: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "URI")]
    pub to: String,

    /// The id of the balloon device at the source; it keeps it.
    #[arg(long, value_name = "ID", default_value = "balloon0")]
    pub device: String,

    /// The bus for it at the destination. Default: the id of the one that it is on at the source.
    #[arg(long, value_name = "ID")]
    pub bus: Option<String>,

    /// The vhost-user socket of the daemon at the destination. It need not be there before it is time.
    #[arg(long, value_name = "PATH")]
    pub device_socket: PathBuf,

    /// The vhost-user socket of the daemon at the source. Default: what QEMU says.
    #[arg(long, value_name = "PATH")]
    pub source_device_socket: Option<PathBuf>,

    /// Write the balloon's state into this file, for the daemon at the destination (its --device-state).
    #[arg(long, value_name = "FILE")]
    pub device_state: Option<PathBuf>,

    /// A shell command that starts the daemon at the destination, run once its state is written. Default: you see to it.
    #[arg(long, value_name = "COMMAND")]
    pub device_command: Option<String>,

    /// Where QEMU's own state goes, as QEMU's migrate takes it. Default: a file for the time of the move, on this host.
    #[arg(long, value_name = "URI")]
    pub vm_state: Option<String>,

    /// How memory is sent.
    #[command(flatten)]
    pub migration_parameters: MigrationParameters,

    /// The longest that a single step may take, in seconds, but for the rounds of memory.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub step_limit: u64,

    /// Tell the source QEMU to quit once the destination runs. Otherwise it stays, paused.
    #[arg(long)]
    pub quit_source: bool,

    /// Look, and print what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::path::PathBuf;

use clap::Parser;
use shared_abi::features::Features;
use tracing::level_filters::LevelFilter;

use crate::confine::{Confinement, Sandbox, Seccomp, Switch};
use crate::vring::NotificationSuppression;

const EXAMPLES: &str = "\
Features:
  stats                 memory statistics of the guest (the only feature on by default)
  must-tell-host        the driver notifies the device before it uses a page from the balloon
  deflate-on-oom        the driver deflates the balloon when the guest is out of memory
  free-page-hint        the driver hints free pages on request, and a live migration need not send them
  page-poison           the driver reports the value that the guest fills its free pages with
  free-page-reporting   the driver reports free pages without a request, and the host frees their memory

Examples:
  A balloon for QEMU (11 or newer), with free page hinting:
    vhost-device-balloon --socket-path /tmp/b.sock --qmp-socket /tmp/b.qmp --free-page-hint
    qemu-system-x86_64 ... -m 512M \\
      -object memory-backend-memfd,id=mem,size=512M,share=on -machine q35,memory-backend=mem \\
      -chardev socket,id=c0,path=/tmp/b.sock \\
      -device vhost-user-test-device-pci,chardev=c0,virtio-id=5,num_vqs=5,vq_size=128,config_size=16

  A balloon for user-mode Linux:
    linux mem=512M ... virtio_uml.device=/tmp/b.sock:5

  QMP commands, one JSON object per command, after qmp_capabilities:
    socat - UNIX-CONNECT:/tmp/b.qmp
    {\"execute\":\"qmp_capabilities\"}
    {\"execute\":\"balloon\",\"arguments\":{\"value\":268435456}}
    {\"execute\":\"free-page-hint-start\"}
    {\"execute\":\"query-free-page-hint\"}
    {\"execute\":\"free-page-hint-done\"}
    {\"execute\":\"query-commands\"}

  Live migration of guest memory, with the commands of QEMU. Start 'balloonctl receive' at the destination first.
  'balloonctl migrate' at the source sends these commands:
    {\"execute\":\"migrate-set-parameters\",\"arguments\":{\"downtime-limit\":100,\"multifd-compression\":\"zstd\"}}
    {\"execute\":\"migrate\",\"arguments\":{\"uri\":\"unix:/tmp/ram.sock\",\"vmm-qmp\":\"/tmp/vm.qmp\"}}
    {\"execute\":\"query-migrate\"}
    {\"execute\":\"migrate_cancel\"}

  Live migration that skips free pages on any host kernel. The guest needs the driver of this project:
    vhost-device-balloon --socket-path /tmp/b.sock --qmp-socket /tmp/b.qmp --discard-hinted

  Saved state for the destination of a migration: the first command at the source, the second at the destination:
    {\"execute\":\"save-device-state\",\"arguments\":{\"filename\":\"/tmp/b.state\"}}
    vhost-device-balloon --socket-path /tmp/b2.sock --qmp-socket /tmp/b2.qmp --free-page-hint --device-state /tmp/b.state

During a migration, the signals below and quit first cancel the migration, and the guest keeps running. If the front end
disconnects in the state pre-switchover or device, the migration continues. The daemon exits after the migration, once
all QMP clients have disconnected, or 30 seconds later.

The daemon gives up its rights once its sockets exist: see --sandbox, --seccomp, --landlock and --drop-capabilities. A broker
process keeps them, and starts a helper process while a migration runs. --migration off keeps no rights for migrations.

The log goes to standard error. The daemon never waits for its reader: lines that are not read in time are lost and counted.

Exit status: 0 after SIGTERM, SIGINT, SIGHUP, SIGQUIT or quit, or after the front end disconnected; 1 after an error.";

/// Virtio memory balloon as a vhost-user device.
///
/// Serves one VMM at a time. Exits when the VMM disconnects, unless --persistent is given.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub struct Args {
    /// Path of the vhost-user socket, for the VMM.
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Path of the QMP socket, for QMP clients.
    #[arg(long, value_name = "PATH")]
    pub qmp_socket: Option<PathBuf>,

    /// Features to offer, separated by commas. Features that are not listed are off, unless their own option is given.
    #[arg(long, value_name = "LIST", default_value = "stats")]
    pub features: FeatureList,

    /// Also offer free-page-hint.
    #[arg(long)]
    pub free_page_hint: bool,

    /// Offer free-page-hint, and free the host memory of hinted pages.
    ///
    /// Needs a driver that keeps a hinted block until the device returns its buffer, as the driver of this project does.
    /// The device offers a private feature bit for it. With any other driver nothing is discarded, a migration still
    /// uses hints where that is sound, and the daemon logs a warning.
    #[arg(long)]
    pub discard_hinted: bool,

    /// Also offer page-poison.
    #[arg(long)]
    pub page_poison: bool,

    /// Also offer deflate-on-oom.
    #[arg(long)]
    pub deflate_on_oom: bool,

    /// Also offer free-page-reporting.
    #[arg(long)]
    pub free_page_reporting: bool,

    /// Also offer must-tell-host.
    #[arg(long)]
    pub must_tell_host: bool,

    /// Keep the host memory of balloon pages, reported pages and hinted pages allocated.
    ///
    /// For guests with assigned devices (VFIO, iommufd, vDPA) that the daemon cannot see. The balloon still answers all
    /// requests. QMP: `inhibit-discard` and `allow-discard`.
    #[arg(long)]
    pub inhibit_discard: bool,

    /// Do not offer VIRTIO_RING_F_EVENT_IDX. For front ends or drivers that mishandle it.
    ///
    /// The device then suppresses notifications with the flag of the used ring.
    #[arg(long)]
    pub no_event_idx: bool,

    /// Never suppress notifications: the driver sends each one, and the device counts it.
    ///
    /// Slower. For measurements only. Implies --no-event-idx.
    #[arg(long)]
    pub every_notification: bool,

    /// Restore the saved state in this file, which `save-device-state` wrote. For the destination of a migration.
    ///
    /// Restores the balloon size, the poison value and the next hint id. Use the feature options of the daemon that saved
    /// the state, or more: the features that the driver accepted must be offered.
    #[arg(long, value_name = "FILE")]
    pub device_state: Option<PathBuf>,

    /// Wait for the next VMM when one disconnects.
    #[arg(long)]
    pub persistent: bool,

    /// The sandbox of the daemon: none, chroot or namespace. Default: namespace, with a warning if the host forbids it.
    ///
    /// namespace: an empty root directory, and mount, network, IPC and user namespaces. chroot: an empty root directory;
    /// needs root. The sockets stay where they are, and files that QMP clients name are those of the host.
    #[arg(long, value_name = "KIND", value_enum, hide_possible_values = true)]
    pub sandbox: Option<Sandbox>,

    /// What happens at a system call that the daemon does not need: none, log, trap or kill.
    ///
    /// trap: the daemon names it on standard error, and SIGSYS kills the daemon. kill: the kernel kills the daemon. log:
    /// the kernel logs it and executes it.
    #[arg(
        long,
        value_name = "ACTION",
        value_enum,
        default_value = "trap",
        hide_possible_values = true
    )]
    pub seccomp: Seccomp,

    /// Whether the daemon gives up access to files, TCP ports and other processes with Landlock: on or off.
    #[arg(
        long,
        value_name = "SWITCH",
        value_enum,
        default_value = "on",
        hide_possible_values = true
    )]
    pub landlock: Switch,

    /// Whether the daemon drops all capabilities: on or off.
    #[arg(
        long,
        value_name = "SWITCH",
        value_enum,
        default_value = "on",
        hide_possible_values = true
    )]
    pub drop_capabilities: Switch,

    /// Whether the daemon refuses new privileges: on or off. --seccomp and --landlock include it.
    #[arg(
        long,
        value_name = "SWITCH",
        value_enum,
        default_value = "on",
        hide_possible_values = true
    )]
    pub no_new_privs: Switch,

    /// Whether the daemon migrates guests and saves states: on or off.
    ///
    /// off: migrate and save-device-state are refused, and no process of the daemon starts one that reads other processes,
    /// connects to an address or writes files.
    #[arg(
        long,
        value_name = "SWITCH",
        value_enum,
        default_value = "on",
        hide_possible_values = true
    )]
    pub migration: Switch,

    /// Log level: off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,
}

impl Args {
    /// Returns the features to offer: those of `--features` and those that have an option of their own.
    pub fn offered_features(&self) -> Features {
        let FeatureList(listed) = self.features;
        [
            (
                self.free_page_hint || self.discard_hinted,
                Features::FREE_PAGE_HINT,
            ),
            (self.discard_hinted, Features::KEEPS_HINTED_UNTIL_RETURNED),
            (self.page_poison, Features::PAGE_POISON),
            (self.deflate_on_oom, Features::DEFLATE_ON_OOM),
            (self.free_page_reporting, Features::REPORTING),
            (self.must_tell_host, Features::MUST_TELL_HOST),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(listed, |all, (_, feature)| all | feature)
    }

    /// Returns the measures that confine the daemon.
    pub fn confinement(&self) -> Confinement {
        Confinement {
            sandbox: self.sandbox,
            seccomp: self.seccomp,
            landlock: self.landlock,
            drop_capabilities: self.drop_capabilities,
            no_new_privs: self.no_new_privs,
        }
    }

    /// Returns how drivers are asked to leave out notifications.
    pub fn suppression(&self) -> NotificationSuppression {
        match (self.every_notification, self.no_event_idx) {
            (true, _) => NotificationSuppression::Never,
            (false, true) => NotificationSuppression::Flag,
            (false, false) => NotificationSuppression::EventIdx,
        }
    }
}

/// A set of features, parsed from a comma-separated list of names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FeatureList(pub Features);

impl std::str::FromStr for FeatureList {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        // This feature changes the effect of a hint on memory, so only its own option enables it.
        let known = Features::from_bits(u64::MAX).without(Features::KEEPS_HINTED_UNTIL_RETURNED);
        list.split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .try_fold(Features::NONE, |all, name| {
                let feature = Features::from_name(name).filter(|feature| known.contains(*feature));
                feature.map(|feature| all | feature).ok_or_else(|| {
                    let names: Vec<_> = known.names().collect();
                    format!(
                        "feature '{name}' is unknown; known features: {}",
                        names.join(", ")
                    )
                })
            })
            .map(Self)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn offered_features(arguments: &[&str]) -> Features {
        let arguments = ["vhost-device-balloon", "--socket-path", "s"]
            .iter()
            .chain(arguments);
        Args::try_parse_from(arguments).unwrap().offered_features()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    /// `docs/commands.md` is the reference page.
    #[test]
    fn the_reference_page_has_every_option() {
        let page = include_str!("../../../docs/commands.md");
        let words: Vec<_> = page
            .split(|character: char| !character.is_ascii_alphanumeric() && character != '-')
            .collect();
        let command = Args::command();
        let options = command.get_arguments().filter_map(|it| it.get_long());
        let missing: Vec<_> = options
            .filter(|name| !words.contains(&format!("--{name}").as_str()))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn r10_new_features_are_off_unless_asked_for() {
        assert_eq!(offered_features(&[]), Features::STATS_VQ);
        assert_eq!(offered_features(&["--features", ""]), Features::NONE);
        let both = Features::STATS_VQ | Features::FREE_PAGE_HINT;
        assert_eq!(offered_features(&["--free-page-hint"]), both);
        assert_eq!(
            offered_features(&["--features", "stats,free-page-hint"]),
            both
        );
        assert!("stats,nonsense"
            .parse::<FeatureList>()
            .unwrap_err()
            .contains("nonsense"));
        let discarding = both | Features::KEEPS_HINTED_UNTIL_RETURNED;
        assert_eq!(offered_features(&["--discard-hinted"]), discarding);
        assert!("discard-hinted".parse::<FeatureList>().is_err());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::path::PathBuf;

use clap::Parser;
use shared_abi::features::Features;
use tracing::level_filters::LevelFilter;

use crate::vring::NotificationSuppression;

const EXAMPLES: &str = "\
Features:
  stats                 statistics of the guest's memory (on unless --features says otherwise)
  must-tell-host        the driver tells before it uses a page from the balloon again
  deflate-on-oom        the driver takes pages back when the guest runs out of memory
  free-page-hint        the guest names free pages, so that a migration need not send them
  page-poison           the guest says what it fills its free pages with
  free-page-reporting   the guest gives free pages back to the host by itself

Examples:
  A balloon for QEMU (11 or newer), with free page hinting:
    vhost-device-balloon --socket-path /tmp/b.sock --qmp-socket /tmp/b.qmp --free-page-hint
    qemu-system-x86_64 ... -m 512M \\
      -object memory-backend-memfd,id=mem,size=512M,share=on -machine q35,memory-backend=mem \\
      -chardev socket,id=c0,path=/tmp/b.sock \\
      -device vhost-user-test-device-pci,chardev=c0,virtio-id=5,num_vqs=5,vq_size=128,config_size=16

  For user-mode Linux:
    linux mem=512M ... virtio_uml.device=/tmp/b.sock:5

  Steering it, one JSON object a command, after qmp_capabilities:
    socat - UNIX-CONNECT:/tmp/b.qmp
    {\"execute\":\"qmp_capabilities\"}
    {\"execute\":\"balloon\",\"arguments\":{\"value\":268435456}}
    {\"execute\":\"free-page-hint-start\"}
    {\"execute\":\"query-free-page-hint\"}
    {\"execute\":\"free-page-hint-done\"}
    {\"execute\":\"query-commands\"}

  Sending the guest's memory elsewhere while it runs, as QEMU's commands of these names do. At the other end listens
  'balloonctl receive'; 'balloonctl migrate' does what is here with less typing:
    {\"execute\":\"migrate-set-parameters\",\"arguments\":{\"downtime-limit\":100,\"multifd-compression\":\"zstd\"}}
    {\"execute\":\"migrate\",\"arguments\":{\"uri\":\"unix:/tmp/ram.sock\",\"vmm-qmp\":\"/tmp/vm.qmp\"}}
    {\"execute\":\"query-migrate\"}
    {\"execute\":\"migrate_cancel\"}

  The same, sparing what the guest holds free on any kernel: needs this project's driver in the guest
    vhost-device-balloon --socket-path /tmp/b.sock --qmp-socket /tmp/b.qmp --discard-hinted

  A balloon that goes on at the destination of a migration: at the source, then there
    {\"execute\":\"save-device-state\",\"arguments\":{\"filename\":\"/tmp/b.state\"}}
    vhost-device-balloon --socket-path /tmp/b2.sock --qmp-socket /tmp/b2.qmp --free-page-hint --device-state /tmp/b.state

During a migration SIGTERM, SIGINT and quit give it up first: the guest runs on. When the front end goes while the
migration waits in pre-switchover or later, it goes on, and the program ends after it, once operators have gone too.

Exit status: 0 when it was told to end (SIGTERM, SIGINT, quit) or its front end has gone; 1 after an error.";

/// A virtio memory balloon as a vhost-user device.
///
/// Listens for one VMM at a time, and ends when the VMM has gone unless --persistent is given.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub struct Args {
    /// Where the VMM connects: a path for a Unix socket.
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,

    /// Where operators connect: a path for a Unix socket that speaks QMP.
    #[arg(long, value_name = "PATH")]
    pub qmp_socket: Option<PathBuf>,

    /// The features to offer, separated by commas. New ones are off unless asked for.
    #[arg(long, value_name = "LIST", default_value = "stats")]
    pub features: FeatureList,

    /// Offer free-page-hint as well.
    #[arg(long)]
    pub free_page_hint: bool,

    /// Offer free-page-hint, and give the memory of hinted pages back to the host too.
    ///
    /// That needs a driver that keeps a hinted block until the device has returned it, as this project's does: it is
    /// asked by a private feature bit. With another driver nothing is discarded, hints only spare sending, and the
    /// log says so.
    #[arg(long)]
    pub discard_hinted: bool,

    /// Offer page-poison as well.
    #[arg(long)]
    pub page_poison: bool,

    /// Offer deflate-on-oom as well.
    #[arg(long)]
    pub deflate_on_oom: bool,

    /// Offer free-page-reporting as well.
    #[arg(long)]
    pub free_page_reporting: bool,

    /// Offer must-tell-host as well.
    #[arg(long)]
    pub must_tell_host: bool,

    /// Do not offer VIRTIO_RING_F_EVENT_IDX: for front ends or drivers that mishandle it.
    ///
    /// Drivers are asked by a flag of the ring instead not to notify while the device works anyway.
    #[arg(long)]
    pub no_event_idx: bool,

    /// Never ask a driver not to notify: so each notification that it would make is made, and counted.
    ///
    /// Slower, and for measuring only. Includes --no-event-idx.
    #[arg(long)]
    pub every_notification: bool,

    /// Go on from the state in this file, which `save-device-state` wrote: for the destination of a migration.
    ///
    /// The balloon's size, the poison value and the next hint id are what they were. The other options have to be those
    /// of the daemon that saved it, or offer more.
    #[arg(long, value_name = "FILE")]
    pub device_state: Option<PathBuf>,

    /// Wait for the next VMM when one has gone.
    #[arg(long)]
    pub persistent: bool,

    /// What to log: off, error, warn, info, debug or trace.
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
                        "there is no feature '{name}'; there are {}",
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

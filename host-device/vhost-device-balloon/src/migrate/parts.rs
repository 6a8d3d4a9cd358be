// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration is made of: who tracks writes, whether hints are used, who pauses the guest, where pages go.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use migration::digest::{ContentDigest, PageHasher};
use migration::machine::{Machine, Processes, QmpMachine};
use migration::precopy::{Parts, PrecopyError, Progress, Sink, SinkError};
use migration::status;
use migration::stream::{Address, Compression as Packing, Options, Writer};
use migration::track::{choose, Request, SentTable};
use migration::{Cancel, HintSource, Memory, Run};
use tracing::info;

use super::hints::{Claim, DeviceHints};
use super::parameters::{Capabilities, Compression, Parameters, Tracking};
use crate::device::lending::Claimed;
use crate::device::Device;

/// What was asked for.
pub struct Order {
    /// Where to.
    pub address: Address,
    /// The VMM's QMP socket.
    pub vmm_qmp: Option<PathBuf>,
    /// How.
    pub parameters: Parameters,
    /// See [`Parameters`].
    pub capabilities: Capabilities,
}

/// What was found at the device.
pub struct Found {
    /// The claim on it.
    pub claim: Claim,
    /// What came with that.
    pub claimed: Claimed,
    /// The device.
    pub device: Arc<Mutex<Device>>,
}

/// The way to the destination, not gone yet.
pub struct Way {
    address: Address,
    parameters: Parameters,
    /// There if the hints have not got it: it is to last until the end.
    claim: Option<Claim>,
}

impl Order {
    /// Chooses everything, and notes in `progress` how writes are tracked and why.
    ///
    /// Takes as long as the VMM takes to answer.
    pub fn choose(
        self,
        found: Found,
        progress: &Progress,
        cancel: &Cancel,
    ) -> Result<(Parts, Way), PrecopyError> {
        let Found {
            claim,
            claimed,
            device,
        } = found;
        let Claimed {
            memory,
            punched,
            discards,
            hints: can_hint,
        } = claimed;
        let machine = self.machine(&memory)?;
        let request = match self.parameters.dirty_tracking {
            Tracking::Auto => Request::Auto,
            Tracking::SoftDirty => Request::SoftDirty,
            Tracking::Content => Request::Content,
        };
        let wanted = self.parameters.free_page_hint;
        // Whatever this program writes to guest memory, it writes under the device's lock.
        let quiesce = Box::new(device);
        let choice = choose(request, wanted, discards, &memory, &punched, quiesce)?;
        let mut reason = choice.why;
        if let (true, Err(why)) = (choice.hints, &can_hint) {
            reason = format!("{reason}, but there are none: {why}");
        }
        let with_hints = choice.hints && can_hint.is_ok();
        info!("migration: {reason}");
        progress.tracking(status::Tracking {
            mode: choice.tracker.name().into(),
            free_page_hint: with_hints,
            reason,
        });
        let compares = choice.tracker.sent_table().is_some();
        let sent = match self.parameters.verify && !compares {
            true => Some(SentTable::new(memory.layout())?),
            false => None,
        };
        let (hints, claim): (Option<Box<dyn HintSource>>, _) = match with_hints {
            true => (
                Some(Box::new(DeviceHints::new(claim, discards, cancel))),
                None,
            ),
            false => (None, Some(claim)),
        };
        let parts = Parts {
            memory,
            tracker: choice.tracker,
            sent,
            hints,
            machine,
        };
        let way = Way {
            address: self.address,
            parameters: self.parameters,
            claim,
        };
        Ok((parts, way))
    }

    /// Who pauses the guest: nobody, if somebody else is to do that.
    fn machine(&self, memory: &Memory) -> Result<Option<Box<dyn Machine>>, PrecopyError> {
        if self.capabilities.pause_before_switchover {
            return Ok(None);
        }
        let machine: Box<dyn Machine> = match &self.vmm_qmp {
            Some(path) => Box::new(QmpMachine::new(path)?),
            None => Box::new(Processes::new(memory)?),
        };
        info!(
            "migration: the guest is paused through {}",
            machine.describe()
        );
        Ok(Some(machine))
    }
}

impl Way {
    /// What goes it. `cancel` ends that.
    pub fn connector(
        self,
        cancel: &Cancel,
    ) -> impl FnOnce(&Memory, Option<&PageHasher>) -> Result<Box<dyn Sink>, SinkError> {
        let cancel = cancel.clone();
        move |memory, hasher| {
            let compression = match self.parameters.multifd_compression {
                Compression::None => Packing::None,
                Compression::Zstd => Packing::Zstd(self.parameters.multifd_zstd_level.into()),
            };
            let options = Options {
                channels: self.parameters.multifd_channels,
                compression,
                seed: hasher.map_or(0, PageHasher::seed),
                cancel,
                ..Options::default()
            };
            let writer = Writer::start(self.address, memory.layout(), options)?;
            Ok(Box::new(Stream {
                writer: Some(writer),
                bytes: 0,
                _claim: self.claim,
            }))
        }
    }
}

/// A stream, and the claim on the device while it lasts.
struct Stream {
    /// There until the end.
    writer: Option<Writer>,
    /// What went over the wire, when it has ended.
    bytes: u64,
    _claim: Option<Claim>,
}

impl Stream {
    fn writer(&mut self) -> Result<&mut Writer, SinkError> {
        self.writer
            .as_mut()
            .ok_or_else(|| "the stream has ended already".into())
    }
}

impl Sink for Stream {
    fn zeros(&mut self, run: Run) -> Result<(), SinkError> {
        Ok(self.writer()?.zeros(run)?)
    }

    fn pages(&mut self, run: Run, bytes: &[u8]) -> Result<(), SinkError> {
        Ok(self.writer()?.pages(run, bytes)?)
    }

    fn pages_from(&mut self, run: Run, memory: &Memory) -> Result<(), SinkError> {
        Ok(self.writer()?.pages_from(run, memory)?)
    }

    fn end_round(&mut self) -> Result<(), SinkError> {
        Ok(self.writer()?.end_round()?)
    }

    fn finish(&mut self, digest: Option<ContentDigest>) -> Result<(), SinkError> {
        let writer = self.writer.take().ok_or("the stream has ended already")?;
        let receipt = writer.finish(digest.map(|digest| digest.value()))?;
        self.bytes = receipt.bytes;
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.writer.as_ref().map_or(self.bytes, Writer::bytes)
    }
}

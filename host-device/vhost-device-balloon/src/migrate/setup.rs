// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Setup of a migration: chooses the tracker, the use of hints, the VM to pause, and the stream.

use std::path::PathBuf;

use guest_migration::digest::{ContentDigest, PageHasher};
use guest_migration::dirty_tracking::{choose_tracker, SentTable, TrackingMode};
use guest_migration::precopy::{Parts, PrecopyError, Progress, Sink, SinkError};
use guest_migration::status;
use guest_migration::stream::{Address, Compression as StreamCompression, Writer, WriterOptions};
use guest_migration::vm::{ProcessVm, QmpVm, Vm};
use guest_migration::{CancelToken, HintSource, Memory, PageRun};
use tracing::info;

use super::device_access::DeviceAccess;
use super::parameters::{Compression, DirtyTracking, MigrationCapabilities, MigrationParameters};

/// What a migration was requested with.
pub struct MigrationConfig {
    /// Address of the destination.
    pub address: Address,
    /// The VMM's QMP socket.
    pub vmm_qmp: Option<PathBuf>,
    /// The parameters.
    pub parameters: MigrationParameters,
    /// The capabilities.
    pub capabilities: MigrationCapabilities,
}

/// Configuration of the stream to the destination, before it is connected.
pub struct StreamConfig {
    address: Address,
    parameters: MigrationParameters,
    /// The claim, if the hint source does not own it. The claim must last until the end of the migration.
    claim: Option<Box<dyn HintSource>>,
}

impl MigrationConfig {
    /// Chooses the parts of the migration. Stores in `progress` how writes are tracked, and why.
    ///
    /// Takes as long as the VMM takes to answer. `cancel` ends this wait.
    pub fn prepare(
        self,
        access: DeviceAccess,
        progress: &Progress,
        cancel: &CancelToken,
    ) -> Result<(Parts, StreamConfig), PrecopyError> {
        let DeviceAccess {
            memory,
            punched,
            discards,
            hint_availability: availability,
            quiesce,
            set_hints_need_discard,
            hints,
        } = access;
        let inherited = self.address.check_inherited();
        inherited.map_err(|error| PrecopyError::Sink(error.into()))?;
        let vm = self.vm(&memory, quiesce.process(), cancel)?;
        let request = match self.parameters.dirty_tracking {
            DirtyTracking::Auto => TrackingMode::Auto,
            DirtyTracking::SoftDirty => TrackingMode::SoftDirty,
            DirtyTracking::Content => TrackingMode::Content,
        };
        let wanted = self.parameters.free_page_hint;
        let choice = choose_tracker(request, wanted, discards, &memory, &punched, quiesce)?;
        let need_discard = discards && choice.tracker.hints_need_discard();
        set_hints_need_discard(need_discard);
        let mut reason = choice.why;
        if let (true, Err(why)) = (choice.use_hints, &availability) {
            reason = format!("{reason}, but hints are not available: {why}");
        }
        let with_hints = choice.use_hints && availability.is_ok();
        info!("migration: {reason}");
        progress.set_tracking(status::TrackingInfo {
            mode: choice.tracker.name().into(),
            free_page_hint: with_hints,
            reason,
        });
        let compares = choice.tracker.sent_table().is_some();
        let sent = match self.parameters.verify && !compares {
            true => Some(SentTable::new(memory.layout())?),
            false => None,
        };
        let (hints, claim) = match with_hints {
            true => (Some(hints), None),
            false => (None, Some(hints)),
        };
        let parts = Parts {
            memory,
            tracker: choice.tracker,
            sent,
            hints,
            vm,
        };
        let stream_config = StreamConfig {
            address: self.address,
            parameters: self.parameters,
            claim,
        };
        Ok((parts, stream_config))
    }

    /// Returns the VM that the migration pauses, or `None` if the QMP client pauses the guest. `device` is the pid of the
    /// device's process.
    fn vm(
        &self,
        memory: &Memory,
        device: u32,
        cancel: &CancelToken,
    ) -> Result<Option<Box<dyn Vm>>, PrecopyError> {
        if self.capabilities.pause_before_switchover {
            return Ok(None);
        }
        let vm: Box<dyn Vm> = match &self.vmm_qmp {
            Some(path) => Box::new(QmpVm::new(path, cancel)?),
            None => Box::new(ProcessVm::new(memory, device)?),
        };
        info!(
            "migration: the switchover pauses the guest through {}",
            vm.describe()
        );
        Ok(Some(vm))
    }
}

impl StreamConfig {
    /// Returns a function that connects the stream to the destination. `cancel` ends the stream.
    pub fn connector(
        self,
        cancel: &CancelToken,
    ) -> impl FnOnce(&Memory, Option<&PageHasher>) -> Result<Box<dyn Sink>, SinkError> {
        let cancel = cancel.clone();
        move |memory, hasher| {
            let compression = match self.parameters.multifd_compression {
                Compression::None => StreamCompression::None,
                Compression::Zstd => {
                    StreamCompression::Zstd(self.parameters.multifd_zstd_level.into())
                }
            };
            let options = WriterOptions {
                channels: self.parameters.multifd_channels,
                compression,
                seed: hasher.map_or(0, PageHasher::seed),
                cancel,
                ..WriterOptions::default()
            };
            let writer = Writer::start(self.address, memory.layout(), options)?;
            Ok(Box::new(StreamSink {
                writer: Some(writer),
                bytes: 0,
                _claim: self.claim,
            }))
        }
    }
}

/// A stream. Keeps the claim on the device while it exists.
struct StreamSink {
    /// `None` after the end of the stream.
    writer: Option<Writer>,
    /// Bytes that were sent, once the stream has ended.
    bytes: u64,
    _claim: Option<Box<dyn HintSource>>,
}

impl StreamSink {
    fn writer(&mut self) -> Result<&mut Writer, SinkError> {
        self.writer
            .as_mut()
            .ok_or_else(|| "stream has already ended".into())
    }
}

impl Sink for StreamSink {
    fn zeros(&mut self, run: PageRun) -> Result<(), SinkError> {
        Ok(self.writer()?.zeros(run)?)
    }

    fn pages(&mut self, run: PageRun, bytes: &[u8]) -> Result<(), SinkError> {
        Ok(self.writer()?.pages(run, bytes)?)
    }

    fn pages_from(&mut self, run: PageRun, memory: &Memory) -> Result<(), SinkError> {
        Ok(self.writer()?.pages_from(run, memory)?)
    }

    fn end_iteration(&mut self) -> Result<(), SinkError> {
        Ok(self.writer()?.end_iteration()?)
    }

    fn finish(&mut self, digest: Option<ContentDigest>) -> Result<(), SinkError> {
        let writer = self.writer.take().ok_or("stream has already ended")?;
        let receipt = writer.finish(digest.map(|digest| digest.value()))?;
        self.bytes = receipt.bytes;
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.writer.as_ref().map_or(self.bytes, Writer::bytes)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the device as the hint source of a migration, with a driver behind a real front end.

mod common;

use std::os::unix::net::UnixListener;
use std::sync::mpsc::{channel, Receiver};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Vmm, HANG_TIMEOUT};
use guest_migration::{CancelToken, HintSource, HintWindow, SyncPhase, WaitOutcome};
use shared_abi::features::Features;
use shared_abi::hinting::device::Phase;
use shared_abi::queue::Queue;
use vhost_device_balloon::device::hinting::HintingError;
use vhost_device_balloon::device::migration_claim::{ClaimError, Invalidated};
use vhost_device_balloon::device::Device;
use vhost_device_balloon::device_lock::{DeviceGuard, DeviceLock};
use vhost_device_balloon::events::Events;
use vhost_device_balloon::migrate::hint_source::{ClaimGuard, DeviceHintSource};
use vhost_device_balloon::session::Session;

const HINT: Features = Features::STATS_VQ.union(Features::FREE_PAGE_HINT);
const DISCARD: Features = HINT.union(Features::KEEPS_HINTED_UNTIL_RETURNED);

/// A device with a driver that a migration has claimed.
struct Fixture {
    device: Arc<DeviceLock>,
    session: Option<Session>,
    vmm: Option<Vmm>,
    hints: Option<DeviceHintSource>,
    cancel: CancelToken,
    window: Option<HintWindow>,
    invalidations: Receiver<Invalidated>,
}

impl Fixture {
    fn new(offered: Features, accepted: Features) -> Self {
        let events = Arc::new(Events::default());
        let device = Arc::new(DeviceLock::new(Device::new(offered, events)));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let served = device.clone();
        let serving = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            Session::start(stream, served, || {}).unwrap()
        });
        let mut vmm = Vmm::connect(&path);
        let session = serving.join().unwrap();
        vmm.start_driver(accepted);
        let limit = Instant::now() + HANG_TIMEOUT;
        while !device.lock().virtio_status().is_running {
            assert!(Instant::now() < limit, "no driver");
            thread::sleep(Duration::from_millis(1));
        }
        let (sender, invalidations) = channel();
        let on_invalidated = Box::new(move |invalidated| sender.send(invalidated).unwrap());
        let (claim, claimed) = ClaimGuard::new(&device, on_invalidated).unwrap();
        let sync = SyncPhase::new(claimed.memory.layout()).unwrap();
        sync.set_all();
        let cancel = CancelToken::default();
        Self {
            hints: Some(DeviceHintSource::new(claim, claimed.discards, &cancel)),
            device,
            session: Some(session),
            vmm: Some(vmm),
            cancel,
            window: Some(sync.finish()),
            invalidations,
        }
    }

    fn device(&self) -> DeviceGuard<'_> {
        self.device.lock()
    }

    fn hints(&mut self) -> &mut DeviceHintSource {
        self.hints.as_mut().unwrap()
    }

    fn vmm(&mut self) -> &mut Vmm {
        self.vmm.as_mut().unwrap()
    }

    /// Opens the window, and returns the id that the driver reads.
    fn open(&mut self) -> u32 {
        let window = self.window.take().unwrap();
        self.hints().open(window).unwrap();
        self.vmm().cmd_id()
    }

    /// Fails to open the window, and returns the error.
    fn does_not_open(&mut self) -> String {
        let window = self.window.take().unwrap();
        let (window, error) = self.hints().open(window).unwrap_err();
        self.window = Some(window);
        error.to_string()
    }

    /// Closes the window, and returns the number of pages that are still dirty.
    fn close(&mut self) -> u64 {
        let sync = self.hints().close().unwrap().close();
        let dirty = sync.bitmap().dirty_pages();
        self.window = Some(sync.finish());
        dirty
    }

    fn send_cmd_id(&mut self, id: u32) {
        self.vmm().send(Queue::FreePage, &id.to_le_bytes());
    }

    fn hint(&mut self, offset: u64, length: u32) {
        self.vmm()
            .offer(Queue::FreePage, Vmm::FREE + offset, length, true);
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.vmm = None;
        if let Some(session) = self.session.take() {
            session.join();
        }
    }
}

#[test]
fn r6_hints_count_between_open_and_close_only() {
    let mut it = Fixture::new(HINT, HINT);
    assert!(!it.hints().discards());
    let all = it.window.as_ref().unwrap().bitmap().dirty_pages();
    // A hint before any request belongs to no hint round.
    it.hint(0, 0x1000);
    let first = it.open();
    it.send_cmd_id(first);
    it.hint(0, 0x4000);
    it.send_cmd_id(0);
    let cancel = it.cancel.clone();
    assert_eq!(
        it.hints().wait(HANG_TIMEOUT, &cancel),
        WaitOutcome::Finished
    );
    // R14: hints after the wait count until the window is closed.
    assert_eq!(it.close(), all - 4);
    assert_eq!(it.vmm().cmd_id(), 0);
    it.hint(0x4000, 0x1000);

    let second = it.open();
    assert_eq!(second, first + 1, "R8");
    it.hint(0x5000, 0x1000);
    it.send_cmd_id(first);
    it.hint(0x6000, 0x1000);
    it.send_cmd_id(second);
    it.hint(0x7000, 0x1000);
    assert_eq!(it.close(), all - 5);
    it.hints().done();
    assert_eq!(it.vmm().cmd_id(), 1);
    it.hints().done();
    assert!(it.hints().close().is_err());
}

#[test]
fn r14_waiting_ends_at_its_limit_and_when_the_migration_is_given_up() {
    let mut it = Fixture::new(HINT, HINT);
    let id = it.open();
    let cancel = it.cancel.clone();
    let began = Instant::now();
    let limit = Duration::from_millis(50);
    assert_eq!(it.hints().wait(limit, &cancel), WaitOutcome::TimedOut);
    assert!(began.elapsed() >= limit);
    // The driver has started the round and does not finish it.
    it.send_cmd_id(id);
    assert_eq!(
        it.hints().wait(Duration::ZERO, &cancel),
        WaitOutcome::TimedOut
    );
    let canceller = thread::spawn({
        let cancel = cancel.clone();
        move || cancel.cancel()
    });
    assert_eq!(
        it.hints().wait(Duration::MAX, &cancel),
        WaitOutcome::Cancelled
    );
    canceller.join().unwrap();
    it.close();
}

#[test]
fn r16_the_window_is_not_lost_with_the_driver_or_the_front_end() {
    let mut it = Fixture::new(HINT, HINT);
    let all = it.window.as_ref().unwrap().bitmap().dirty_pages();
    let cancel = it.cancel.clone();

    // The driver is reset during a hint round, and restarts.
    let first = it.open();
    it.send_cmd_id(first);
    it.hint(0, 0x1000);
    it.vmm().stop_driver();
    it.vmm().start_driver(HINT);
    it.vmm().send(Queue::Inflate, &[]);
    let WaitOutcome::Lost(why) = it.hints().wait(HANG_TIMEOUT, &cancel) else {
        panic!("no driver will answer");
    };
    assert!(why.contains("driver restarted"), "{why}");
    it.hint(0x1000, 0x1000);
    assert_eq!(it.close(), all - 1, "what came before counts");

    // The next window is for the new driver.
    let second = it.open();
    assert_ne!(first, second);
    it.send_cmd_id(second);
    it.hint(0x2000, 0x1000);
    thread::scope(|scope| {
        let hints = it.hints.as_mut().unwrap();
        let waiter = scope.spawn(|| hints.wait(Duration::MAX, &cancel));
        it.vmm = None;
        it.session.take().unwrap().join();
        assert!(matches!(waiter.join().unwrap(), WaitOutcome::Lost(_)));
    });
    assert_eq!(it.close(), all - 2);
    assert!(matches!(
        it.invalidations.recv(),
        Ok(Invalidated::FrontEndDisconnected(_))
    ));
    let why = it.does_not_open();
    assert!(why.contains("no front end"), "{why}");
    it.hints().done();
}

#[test]
fn a_migration_has_exclusive_hinting_until_it_releases_the_claim() {
    let mut it = Fixture::new(HINT, HINT);
    let refused = |it: &Fixture| {
        let mut device = it.device();
        assert!(matches!(
            device.start_hinting(),
            Err(HintingError::Migrating)
        ));
        assert!(matches!(
            device.sync_hinting(),
            Err(HintingError::Migrating)
        ));
        let again = device.claim(Box::new(|_| {}));
        assert!(matches!(again, Err(ClaimError::AlreadyClaimed)));
    };
    refused(&it);
    it.open();
    refused(&it);
    // R16: releasing the claim with an open window ends hinting.
    it.hints = None;
    assert_eq!(it.vmm().cmd_id(), 1);
    it.device().start_hinting().unwrap();
    assert!(matches!(
        it.device().hinting_status().phase,
        Phase::Requested(_)
    ));
}

#[test]
fn changed_memory_invalidates_the_claim_and_no_hint_counts() {
    let mut it = Fixture::new(HINT, HINT);
    // The same memory again, as a front end sends it when the guest resumes after a pause.
    it.vmm().share_memory();
    it.open();
    assert!(it.invalidations.try_recv().is_err());
    it.vmm().share_half_the_memory();
    it.vmm().cmd_id();
    assert!(matches!(
        it.invalidations.recv(),
        Ok(Invalidated::MemoryChanged(_))
    ));
    it.close();
    let why = it.does_not_open();
    assert!(why.contains("regions changed during migration"), "{why}");
}

#[test]
fn r17_a_driver_that_does_not_keep_its_blocks_cannot_take_over() {
    let mut it = Fixture::new(DISCARD, DISCARD);
    assert!(it.hints().discards());
    let id = it.open();
    it.send_cmd_id(id);
    it.hint(0, 0x1000);
    assert_eq!(it.device().hinting_status().bytes_discarded, 0x1000);
    it.close();
    it.vmm().stop_driver();
    it.vmm().start_driver(HINT);
    it.vmm().send(Queue::Inflate, &[]);
    let why = it.does_not_open();
    assert!(why.contains("does not keep hinted blocks"), "{why}");
}

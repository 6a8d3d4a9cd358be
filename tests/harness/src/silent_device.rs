// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A balloon device that does not answer. It negotiates all features, and uses no buffers, or only a few of the inflate
//! queue.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use shared_abi::config::{ConfigSpace, MAX_SIZE};
use shared_abi::features::Features;
use shared_abi::queue::Queue;
use vhost::vhost_user::{Listener, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::scratch::Scratch;
use crate::HANG_TIMEOUT;

/// A device that serves one VMM until the VMM disconnects.
#[derive(Debug)]
pub struct SilentDevice {
    socket: PathBuf,
    backend: Arc<Backend>,
}

impl SilentDevice {
    /// Listens in `scratch`. Offers `features`, with `config` as the initial config space.
    ///
    /// # Errors
    ///
    /// Fails if the device cannot listen.
    pub fn start(scratch: &Scratch, features: Features, config: ConfigSpace) -> Result<Self> {
        Self::start_silent_after(0, scratch, features, config)
    }

    /// Does the same as [`SilentDevice::start`], but uses `inflate_requests` buffers of the inflate queue first.
    ///
    /// # Errors
    ///
    /// Fails if the device cannot listen.
    pub fn start_silent_after(
        inflate_requests: u64,
        scratch: &Scratch,
        features: Features,
        config: ConfigSpace,
    ) -> Result<Self> {
        let socket = scratch.path("mute.sock");
        let mut listener = Listener::new(&socket, true)
            .with_context(|| format!("cannot listen at {}", socket.display()))?;
        let backend = Arc::new(Backend {
            features,
            config: Mutex::new(config.to_bytes()),
            kicks: AtomicU64::new(0),
            remaining_requests: AtomicU64::new(inflate_requests),
            memory: Mutex::new(None),
        });
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("mute".into(), backend.clone(), memory)
            .map_err(|error| anyhow::anyhow!("no device: {error}"))?;
        thread::spawn(move || {
            // An error means that the VMM has ended. A VMM that cannot continue reports it.
            let _ = daemon.start(&mut listener).and_then(|()| daemon.wait());
        });
        Ok(Self { socket, backend })
    }

    /// Returns the path of the device's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Stops using buffers.
    pub fn stop_answering(&self) {
        self.backend.remaining_requests.store(0, Ordering::Relaxed);
    }

    /// Returns the number of the driver's notifications.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.backend.kicks.load(Ordering::Relaxed)
    }

    /// Waits until the driver has notified the device at least once.
    ///
    /// # Errors
    ///
    /// Fails if the driver has not notified within [`HANG_TIMEOUT`].
    pub fn wait_kick(&self) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        while self.kicks() == 0 {
            ensure!(
                Instant::now() < deadline,
                "the driver has asked for nothing"
            );
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Backend {
    features: Features,
    config: Mutex<[u8; MAX_SIZE]>,
    kicks: AtomicU64,
    /// The number of inflate requests that the device still answers.
    remaining_requests: AtomicU64,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
}

impl Backend {
    /// Uses available buffers, up to the number of remaining requests.
    fn complete_requests(&self, vring: &VringRwLock) -> io::Result<()> {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(memory) = memory.as_ref() else {
            return Ok(());
        };
        while self.remaining_requests.load(Ordering::Relaxed) > 0 {
            let next = vring
                .get_mut()
                .get_queue_mut()
                .pop_descriptor_chain(memory.memory());
            let Some(chain) = next else {
                return Ok(());
            };
            self.remaining_requests.fetch_sub(1, Ordering::Relaxed);
            vring
                .add_used(chain.head_index(), 0)
                .map_err(io::Error::other)?;
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

/// Returns `length` bytes of the config space at `offset`, or `None` if they are outside it.
fn place(config: &mut [u8; MAX_SIZE], offset: u32, length: usize) -> Option<&mut [u8]> {
    let start = usize::try_from(offset).ok()?;
    config.get_mut(start..start.checked_add(length)?)
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        Queue::MAX_COUNT
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        const VERSION_1: u64 = 1 << 32;
        self.features.bits() | VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {}

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = *self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = place(&mut config, offset, size as usize);
        bytes.map(|bytes| bytes.to_vec()).unwrap_or_default()
    }

    fn set_config(&self, _offset: u32, _data: &[u8]) -> io::Result<()> {
        // The device ignores writes by the driver.
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn handle_event(
        &self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        self.kicks.fetch_add(1, Ordering::Relaxed);
        match vrings.get(usize::from(queue)) {
            // The inflate queue is the first one with any features.
            Some(vring) if queue == 0 => self.complete_requests(vring),
            _ => Ok(()),
        }
    }
}

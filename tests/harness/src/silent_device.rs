// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A balloon device that does not answer: it negotiates everything, and uses no buffer, or a few of the inflate queue at
//! first.

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

/// The device. It serves one VMM, for as long as that is there.
#[derive(Debug)]
pub struct SilentDevice {
    socket: PathBuf,
    backend: Arc<Backend>,
}

impl SilentDevice {
    /// Listens in `scratch`, offering `features`, with `config` in its config space from the start.
    ///
    /// # Errors
    ///
    /// If it cannot listen.
    pub fn start(scratch: &Scratch, features: Features, config: ConfigSpace) -> Result<Self> {
        Self::start_silent_after(0, scratch, features, config)
    }

    /// As [`SilentDevice::start`], and uses so many buffers of the inflate queue before it falls silent.
    ///
    /// # Errors
    ///
    /// If it cannot listen.
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
            // An error is the VMM's end; a VMM that does not get on says so itself.
            let _ = daemon.start(&mut listener).and_then(|()| daemon.wait());
        });
        Ok(Self { socket, backend })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Uses no buffer any more.
    pub fn stop_answering(&self) {
        self.backend.remaining_requests.store(0, Ordering::Relaxed);
    }

    /// How often the driver has notified it.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.backend.kicks.load(Ordering::Relaxed)
    }

    /// Waits until the driver has notified it, whenever it comes to look.
    ///
    /// # Errors
    ///
    /// If it has not by [`HANG_TIMEOUT`].
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
    /// How many requests it still answers.
    remaining_requests: AtomicU64,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
}

impl Backend {
    /// Uses what it still uses of the buffers that are available.
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

/// Bytes of config space from `offset` on, if there are so many.
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
        // What the driver says does not interest it.
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
            // The inflate queue is the first one, whatever the features.
            Some(vring) if queue == 0 => self.complete_requests(vring),
            _ => Ok(()),
        }
    }
}

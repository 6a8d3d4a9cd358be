// SPDX-License-Identifier: GPL-2.0

//! A sample driver on [`virtio`]: it reads from entropy devices.
//!
//! It fills a buffer of [`WANTED`] bytes for each device, and shows it as hexadecimal digits in the
//! debugfs file `virtio_rng_sample/<device>/bytes`. It passes nothing to the kernel's entropy pool:
//! `virtio_rng` does that.
//!
//! A crate that includes `virtio` needs `bindings` at its root, and nothing else. Kbuild makes the
//! module `virtio_rng_sample` only with `VBRS_SAMPLES=y`.

#![deny(unsafe_code)]

use kernel::debugfs::{File, Writer};
use kernel::device::{self, Core};
use kernel::fmt;
use kernel::prelude::*;
use kernel::sync::{new_mutex, Arc, Mutex};

use crate::virtio::work::{self, DelayedWork, WorkItem, WorkQueue};
use crate::virtio::{debugfs, Incoming, QueueHandler, Virtqueue};

#[allow(unsafe_code)]
#[path = "../bindings/mod.rs"]
mod bindings;
// The sample uses a part of it.
#[allow(dead_code)]
#[allow(unsafe_code)]
#[path = "../virtio/mod.rs"]
pub mod virtio;

/// The device id of entropy devices.
const VIRTIO_ID_RNG: u32 = 4;
/// The number of bytes to read from a device.
const WANTED: usize = 256;

/// The memory of a request, which the device fills, wholly or partly.
type Chunk = [u8; 64];

/// The bytes that a device has written.
struct Received {
    bytes: [u8; WANTED],
    length: usize,
}

impl Received {
    /// Appends `bytes`, as far as there is room.
    fn append(&mut self, bytes: impl Iterator<Item = u8>) {
        for (slot, byte) in self.bytes.iter_mut().skip(self.length).zip(bytes) {
            *slot = byte;
            self.length += 1;
        }
    }
}

/// Reads from one device.
#[pin_data]
struct Reader {
    queue: Virtqueue<Incoming<Chunk>>,
    #[pin]
    received: Mutex<Received>,
    #[pin]
    work: DelayedWork<Self>,
}

virtio::work::impl_has_delayed_work! {
    impl HasDelayedWork<0> for Reader { self.work }
}

impl Reader {
    fn new() -> Result<Arc<Self>> {
        let queue = Virtqueue::new(c"requests")?;
        let work_queue = WorkQueue::new(c"virtio_rng_sample")?;
        let reader = pin_init!(Self {
            queue,
            received <- new_mutex!(Received { bytes: [0; WANTED], length: 0 }, "Reader::received"),
            work <- work::new_delayed_work!(work_queue, "Reader::work"),
        });
        Arc::pin_init(reader, GFP_KERNEL)
    }

    /// Gives the device a chunk to fill. A queue without a ring refuses it, and so does a broken
    /// one: then there is nothing more to read.
    fn request(&self, chunk: Incoming<Chunk>) {
        if self.queue.add(chunk).is_ok() {
            self.queue.kick();
        }
    }

    /// Takes what the device has written, and asks for more if some is missing. A device that has
    /// written nothing is not asked again.
    fn take(&self, chunk: Incoming<Chunk>, written: u32) {
        let mut received = self.received.lock();
        received.append(chunk.iter().copied().take(written as usize));
        let is_full = received.length == WANTED;
        drop(received);
        if written > 0 && !is_full {
            self.request(chunk);
        }
    }
}

impl WorkItem for Reader {
    fn run(this: Arc<Self>) {
        loop {
            while let Some((chunk, written)) = this.queue.get_buf() {
                this.take(chunk, written);
            }
            if this.queue.enable_callback() {
                return;
            }
        }
    }
}

/// The interrupt handler. It starts the work item, which may sleep.
struct Interrupt(Arc<Reader>);

impl QueueHandler for Interrupt {
    fn used(&self, _queue: u16) {
        self.0.queue.disable_callback();
        work::enqueue(&self.0);
    }
}

/// The content of the debugfs file.
struct Hexadecimal(Arc<Reader>);

impl Writer for Hexadecimal {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let received = self.0.received.lock();
        for byte in received.bytes.iter().take(received.length) {
            write!(f, "{byte:02x}")?;
        }
        writeln!(f)
    }
}

/// The driver's data for one device.
struct Data {
    reader: Arc<Reader>,
    _file: Option<Pin<KBox<File<Hexadecimal>>>>,
}

impl Data {
    fn bind(dev: &virtio::Device<Core<'_>>) -> Result<Self> {
        let reader = Reader::new()?;
        let first = Incoming::zeroed(GFP_KERNEL)?;
        let device: &device::Device = dev.as_ref();
        let file = match debugfs::device_dir(device) {
            Some(dir) => {
                let content = Hexadecimal(reader.clone());
                let file = dir.read_only_file(c"bytes", Ok::<_, Error>(content));
                Some(KBox::pin_init(file, GFP_KERNEL)?)
            }
            None => None,
        };
        let handler = Arc::new(Interrupt(reader.clone()), GFP_KERNEL)?;
        dev.find_queues(&[&reader.queue], handler)?;
        dev.ready();
        reader.request(first);
        Ok(Self {
            reader,
            _file: file,
        })
    }
}

virtio_device_table!(ID_TABLE, [virtio::DeviceId::new(VIRTIO_ID_RNG)]);

/// The driver.
struct Rng;

#[vtable]
impl virtio::Driver for Rng {
    type Data<'bound> = Data;

    const ID_TABLE: virtio::IdTable = &ID_TABLE;

    fn probe<'bound>(dev: &'bound virtio::Device<Core<'_>>) -> impl PinInit<Data, Error> + 'bound {
        Data::bind(dev)
    }

    // Afterwards the bus resets the device, and the queue drops the chunk that was in flight.
    fn remove<'bound>(_dev: &'bound virtio::Device<Core<'_>>, this: Pin<&Data>) {
        work::disable(&this.reader);
    }
}

module_virtio_driver! {
    type: Rng,
    name: "virtio_rng_sample",
    authors: ["the virtio-balloon-rs authors"],
    description: "Sample of a virtio driver in Rust, which reads from entropy devices",
    license: "GPL",
}

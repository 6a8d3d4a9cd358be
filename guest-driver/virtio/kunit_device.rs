// SPDX-License-Identifier: GPL-2.0

//! A test device: a transport and the device side of its split rings, in memory.
//!
//! Only one thread may use it at a time.

use super::{
    binding::Binding,
    buffer::{Buffer, Segments},
    config::Config,
    AnyQueue, Device, QueueHandler,
};
use crate::bindings;
use core::{
    cell::{Cell, UnsafeCell},
    ffi::c_void,
    ops::Deref,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};
use kernel::{
    container_of,
    device::Core,
    prelude::*,
    sync::{aref::ARef, Arc},
    time::{delay::fsleep, Delta},
};

/// The maximum number of virtqueues: as many as a balloon has.
const QUEUES: usize = 5;

/// The number of entries in each ring of [`BoundTestDevice::new`].
pub(super) const ENTRIES: usize = 4;

/// The maximum number of entries, for which [`Memory`] is large enough.
const ENTRIES_MAX: usize = 128;

/// The size of configuration space in bytes: as for a balloon.
const CONFIG_SIZE: usize = 16;

/// The maximum number of entries in the log of used buffers.
const USED_LOG_SIZE: usize = 16;

const USED_FLAG_NO_NOTIFY: u16 = 1;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITABLE: u16 = 2;

/// The offset of the used ring (`vring_init()` with an alignment of 4096).
const USED: usize = 4096;

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[u8; 8192]>);

/// The test device.
#[repr(C)]
pub(crate) struct TestDevice {
    /// Must be at offset 0: the callbacks of the transport cast between both types.
    vdev: UnsafeCell<bindings::virtio_device>,
    /// The number of entries in each ring.
    entries: Cell<usize>,
    memory: [Memory; QUEUES],
    rings: [Cell<*mut bindings::virtqueue>; QUEUES],
    last_avail_idx: [Cell<u16>; QUEUES],
    used: [Cell<u16>; QUEUES],
    notifications: Cell<u32>,
    notify_fails: Cell<bool>,
    use_on_notify: Cell<bool>,
    /// The log of buffers that were used on notification: the queue and the first word of each.
    used_log: Cell<[(usize, u32); USED_LOG_SIZE]>,
    used_log_len: Cell<usize>,
    find_vqs_fails: Cell<bool>,
    status: Cell<u8>,
    resets: Cell<u32>,
    /// The value of `drops` when the virtqueues were last deleted.
    drops_at_del_vqs: Cell<Option<u32>>,
    drops: Cell<Option<&'static AtomicU32>>,
    config: Cell<[u8; CONFIG_SIZE]>,
}

/// A buffer as the device sees it.
pub(crate) struct DescriptorChain {
    pub(crate) head: u32,
    pub(crate) segments: KVec<Segment>,
}

/// A segment of a buffer as the device sees it.
pub(crate) struct Segment {
    address: u64,
    pub(crate) length: u32,
    pub(crate) writable: bool,
}

impl Segment {
    /// Returns the content of the segment. Its buffer must be in flight.
    pub(super) fn read(&self) -> u64 {
        assert!(self.length == 8);
        // SAFETY: The memory of a buffer in flight is valid, and the segment has 8 bytes.
        let bytes = unsafe {
            bindings::vbrs_test_phys_to_virt(self.address)
                .cast::<[u8; 8]>()
                .read_volatile()
        };
        u64::from_ne_bytes(bytes)
    }

    /// Returns the first 4 bytes of the segment. Its buffer must be in flight.
    pub(crate) fn first_word(&self) -> u32 {
        assert!(self.length >= 4);
        // SAFETY: The memory of a buffer in flight is valid, and the segment has at least 4 bytes.
        let bytes = unsafe {
            bindings::vbrs_test_phys_to_virt(self.address)
                .cast::<[u8; 4]>()
                .read_volatile()
        };
        u32::from_le_bytes(bytes)
    }

    /// Sets the content of the segment. Its buffer must be in flight.
    pub(super) fn write(&self, value: u64) {
        assert!(self.length == 8 && self.writable);
        let bytes = value.to_ne_bytes();
        // SAFETY: The memory of a buffer in flight is valid, and the segment has 8 bytes that the
        // device may write.
        unsafe {
            bindings::vbrs_test_phys_to_virt(self.address)
                .cast::<[u8; 8]>()
                .write_volatile(bytes)
        };
    }
}

static OPS: bindings::virtio_config_ops = bindings::virtio_config_ops {
    get: Some(TestDevice::get),
    set: Some(TestDevice::set),
    generation: None,
    get_status: Some(TestDevice::get_status),
    set_status: Some(TestDevice::set_status),
    reset: Some(TestDevice::reset),
    find_vqs: Some(TestDevice::find_vqs),
    del_vqs: Some(TestDevice::del_vqs),
    synchronize_cbs: None,
    get_features: None,
    get_extended_features: None,
    finalize_features: None,
    bus_name: None,
    set_vq_affinity: None,
    get_vq_affinity: None,
    get_shm_region: None,
    disable_vq_and_reset: None,
    enable_vq_after_reset: None,
};

/// A device with its binding, as between `probe` and `remove`.
pub(crate) struct BoundTestDevice {
    pub(crate) device: OwnedTestDevice,
    binding: *mut Binding,
}

/// The reference of its creator to a device.
pub(crate) struct OwnedTestDevice(NonNull<TestDevice>);

impl Deref for OwnedTestDevice {
    type Target = TestDevice;

    fn deref(&self) -> &TestDevice {
        // SAFETY: `self` has a reference to the device, so the device is valid.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for OwnedTestDevice {
    fn drop(&mut self) {
        // SAFETY: `self` has a reference to the device, which is not used again.
        unsafe { kernel::bindings::put_device(&raw mut (*self.vdev.get()).dev) };
    }
}

impl BoundTestDevice {
    /// Creates a device with small rings and binds it.
    pub(crate) fn new() -> Result<Self> {
        Self::with_entries(ENTRIES)
    }

    /// Creates a device whose rings have `entries` entries, and binds it. `entries` must be a power
    /// of two.
    pub(crate) fn with_entries(entries: usize) -> Result<Self> {
        assert!(entries.is_power_of_two() && entries <= ENTRIES_MAX);
        // SAFETY: All fields are valid if zeroed.
        let zeroed = unsafe {
            pin_init::init_from_closure(|slot: *mut TestDevice| {
                slot.write_bytes(0, 1);
                Ok::<(), Error>(())
            })
        };
        let device = KBox::init(zeroed, GFP_KERNEL)?;
        device.entries.set(entries);
        let vdev = device.vdev.get();
        // SAFETY: No other code uses the device yet, and `Drop` unbinds it before it is freed.
        unsafe {
            bindings::vbrs_test_device_init(vdev);
            (*vdev).config = &OPS;
            (*vdev).dev.init_name = c"kunit".as_char_ptr();
            (*vdev).dev.release = Some(TestDevice::release);
            let device = OwnedTestDevice(NonNull::from(KBox::leak(device)));
            let binding = Binding::new(NonNull::new_unchecked(vdev))?;
            let binding = KBox::into_raw(Pin::into_inner_unchecked(binding));
            (*vdev).priv_ = binding.cast();
            Ok(Self { device, binding })
        }
    }

    /// Creates a device as [`with_entries`](Self::with_entries) does, with these features
    /// negotiated.
    pub(crate) fn with_features(entries: usize, features: u64) -> Result<Self> {
        let bound = Self::with_entries(entries)?;
        for bit in (0..u64::BITS).filter(|bit| features & (1 << bit) != 0) {
            // SAFETY: The device is valid, and no driver uses it yet.
            unsafe { bindings::vbrs_test_set_feature(bound.device.vdev.get(), bit) };
        }
        Ok(bound)
    }

    /// Returns the device as a bus callback sees it.
    pub(crate) fn core(&self) -> &Device<Core<'_>> {
        // SAFETY: The device is valid and has a binding. The test acts as the bus, and may sleep.
        // `Device` is a transparent wrapper.
        unsafe { &*self.device.vdev.get().cast() }
    }

    /// Resets the device, as a driver does.
    pub(crate) fn reset(&self) {
        self.binding().reset();
    }

    pub(super) fn binding(&self) -> &Binding {
        // SAFETY: The binding is valid until `drop`.
        unsafe { &*self.binding }
    }

    /// Returns the configuration space as a driver sees it.
    pub(crate) fn config(&self) -> Result<Config> {
        self.binding().config(CONFIG_SIZE)
    }

    /// Returns a reference to the device.
    pub(crate) fn device_ref(&self) -> ARef<Device> {
        // SAFETY: The device is valid, and `Device` is a transparent wrapper.
        ARef::from(unsafe { &*self.device.vdev.get().cast::<Device>() })
    }

    pub(crate) fn find_queues(
        &self,
        queues: &[&dyn AnyQueue],
        handler: Arc<dyn QueueHandler>,
    ) -> Result {
        self.binding().find_queues(queues, handler)
    }
}

impl Drop for BoundTestDevice {
    fn drop(&mut self) {
        self.binding().unbind();
        // SAFETY: The binding was created from a box, and no virtqueue is left that could call it.
        drop(unsafe { KBox::from_raw(self.binding) });
    }
}

impl TestDevice {
    /// Returns the next buffer that the driver made available on `queue`.
    pub(crate) fn pop_descriptor_chain(&self, queue: usize) -> Option<DescriptorChain> {
        let next = self.last_avail_idx[queue].get();
        if self.read_u16(queue, self.available() + 2) == next {
            return None;
        }
        self.last_avail_idx[queue].set(next.wrapping_add(1));
        let at = 4 + 2 * (usize::from(next) % self.entries.get());
        let head = self.read_u16(queue, self.available() + at);
        let mut chain = DescriptorChain {
            head: head.into(),
            segments: KVec::new(),
        };
        let mut entry = usize::from(head);
        loop {
            let at = 16 * (entry % self.entries.get());
            let flags = self.read_u16(queue, at + 12);
            let segment = Segment {
                address: u64::from_le_bytes(self.read(queue, at)),
                length: u32::from_le_bytes(self.read(queue, at + 8)),
                writable: flags & DESCRIPTOR_WRITABLE != 0,
            };
            // A notification may come from a context that must not sleep.
            chain.segments.push(segment, GFP_ATOMIC).ok()?;
            if flags & DESCRIPTOR_NEXT == 0 {
                return Some(chain);
            }
            entry = self.read_u16(queue, at + 14).into();
        }
    }

    /// Marks the buffer with this head as used.
    pub(crate) fn add_used(&self, queue: usize, head: u32, written: u32) {
        let next = self.used[queue].get();
        let at = USED + 4 + 8 * (usize::from(next) % self.entries.get());
        self.write(queue, at, head.to_le_bytes());
        self.write(queue, at + 4, written.to_le_bytes());
        self.used[queue].set(next.wrapping_add(1));
        self.write(queue, USED + 2, next.wrapping_add(1).to_le_bytes());
    }

    /// Sends an interrupt for `queue` to the driver.
    pub(super) fn interrupt(&self, queue: usize) {
        if let Some(ring) = NonNull::new(self.rings[queue].get()) {
            // SAFETY: The ring is valid until it is deleted, which clears the pointer.
            unsafe { bindings::vring_interrupt(0, ring.as_ptr().cast()) };
        }
    }

    /// Sets whether the device suppresses notifications of `queue`.
    pub(super) fn suppress_notifications(&self, queue: usize, suppress: bool) {
        let flags = if suppress { USED_FLAG_NO_NOTIFY } else { 0 };
        self.write(queue, USED, flags.to_le_bytes());
    }

    /// Returns whether the driver suppresses interrupts of `queue`.
    pub(crate) fn interrupts_suppressed(&self, queue: usize) -> bool {
        self.read_u16(queue, self.available()) & 1 != 0
    }

    /// Sets whether the device uses all available buffers on notification.
    pub(crate) fn set_use_on_notify(&self, use_on_notify: bool) {
        self.use_on_notify.set(use_on_notify);
    }

    /// Returns and clears the log of buffers that were used on notification: the queue and the
    /// first 4 bytes of each.
    pub(crate) fn take_used_log(&self) -> Result<KVec<(usize, u32)>> {
        let used_log = self.used_log.get();
        let mut taken = KVec::new();
        taken.extend_from_slice(&used_log[..self.used_log_len.replace(0)], GFP_KERNEL)?;
        Ok(taken)
    }

    /// Uses the next available buffer of `queue`, and returns its first 4 bytes.
    pub(crate) fn use_buffer(&self, queue: usize) -> Option<u32> {
        let chain = self.pop_descriptor_chain(queue)?;
        let word = chain.segments.first()?.first_word();
        self.add_used(queue, chain.head, 0);
        Some(word)
    }

    /// Makes all notifications fail.
    pub(super) fn fail_notify(&self) {
        self.notify_fails.set(true);
    }

    /// Makes the next `find_vqs` fail.
    pub(super) fn fail_find_vqs(&self) {
        self.find_vqs_fails.set(true);
    }

    pub(crate) fn notifications(&self) -> u32 {
        self.notifications.get()
    }

    pub(super) fn resets(&self) -> u32 {
        self.resets.get()
    }

    /// Records the value of `drops` whenever the virtqueues are deleted.
    pub(super) fn watch_drops(&self, drops: &'static AtomicU32) {
        self.drops.set(Some(drops));
    }

    /// Returns the value of the recorded counter when the virtqueues were last deleted.
    pub(super) fn drops_at_del_vqs(&self) -> Option<u32> {
        self.drops_at_del_vqs.get()
    }

    /// Sets the little-endian number at `offset` of configuration space.
    pub(crate) fn set_config(&self, offset: usize, value: u32) {
        let mut config = self.config.get();
        config[offset..][..4].copy_from_slice(&value.to_le_bytes());
        self.config.set(config);
    }

    /// Returns the little-endian number at `offset` of configuration space.
    pub(crate) fn config_at(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.config.get()[offset..][..4]);
        u32::from_le_bytes(bytes)
    }

    /// Returns the offset of the available ring (`vring_init()` with an alignment of 4096).
    fn available(&self) -> usize {
        16 * self.entries.get()
    }

    fn at(&self, queue: usize, offset: usize) -> *mut u8 {
        // The bounds are checked here, because the memory is one array.
        let memory: *mut [u8; 8192] = self.memory[queue].0.get();
        assert!(offset < 8192 - 8);
        memory.cast::<u8>().wrapping_add(offset)
    }

    fn read<const N: usize>(&self, queue: usize, offset: usize) -> [u8; N] {
        // SAFETY: `at` returns a pointer to at least 8 bytes within the memory of the ring.
        unsafe { self.at(queue, offset).cast::<[u8; N]>().read_volatile() }
    }

    fn write<const N: usize>(&self, queue: usize, offset: usize, bytes: [u8; N]) {
        // SAFETY: `at` returns a pointer to at least 8 bytes within the memory of the ring.
        unsafe {
            self.at(queue, offset)
                .cast::<[u8; N]>()
                .write_volatile(bytes)
        };
    }

    fn read_u16(&self, queue: usize, offset: usize) -> u16 {
        u16::from_le_bytes(self.read(queue, offset))
    }

    /// Returns the test device of `vdev`.
    ///
    /// # Safety
    ///
    /// `vdev` must belong to a test device.
    unsafe fn from_vdev<'a>(vdev: *mut bindings::virtio_device) -> &'a Self {
        // SAFETY: By the safety requirements of this function, `vdev` belongs to a test device,
        // where it is at offset 0.
        unsafe { &*vdev.cast() }
    }

    extern "C" fn release(dev: *mut kernel::bindings::device) {
        // SAFETY: The kernel calls this for the last reference to a test device, which was created
        // from a box. `vdev` is at offset 0.
        unsafe {
            let vdev = container_of!(dev, bindings::virtio_device, dev);
            drop(KBox::from_raw(vdev.cast::<Self>()));
        }
    }

    extern "C" fn get(
        vdev: *mut bindings::virtio_device,
        offset: c_uint,
        to: *mut c_void,
        length: c_uint,
    ) {
        // SAFETY: The bus passes a test device, and a buffer of this length.
        let (device, to) = unsafe {
            (
                Self::from_vdev(vdev),
                core::slice::from_raw_parts_mut(to.cast::<u8>(), length as usize),
            )
        };
        let config = device.config.get();
        if let Some(from) = config
            .get(offset as usize..)
            .and_then(|rest| rest.get(..to.len()))
        {
            to.copy_from_slice(from);
        }
    }

    extern "C" fn set(
        vdev: *mut bindings::virtio_device,
        offset: c_uint,
        from: *const c_void,
        length: c_uint,
    ) {
        // SAFETY: The bus passes a test device, and a buffer of this length.
        let (device, from) = unsafe {
            (
                Self::from_vdev(vdev),
                core::slice::from_raw_parts(from.cast::<u8>(), length as usize),
            )
        };
        let mut config = device.config.get();
        if let Some(to) = config
            .get_mut(offset as usize..)
            .and_then(|rest| rest.get_mut(..from.len()))
        {
            to.copy_from_slice(from);
        }
        device.config.set(config);
    }

    extern "C" fn get_status(vdev: *mut bindings::virtio_device) -> u8 {
        // SAFETY: The bus passes a test device.
        unsafe { Self::from_vdev(vdev) }.status.get()
    }

    extern "C" fn set_status(vdev: *mut bindings::virtio_device, status: u8) {
        // SAFETY: The bus passes a test device.
        unsafe { Self::from_vdev(vdev) }.status.set(status);
    }

    extern "C" fn reset(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus passes a test device.
        let device = unsafe { Self::from_vdev(vdev) };
        device.status.set(0);
        device.resets.set(device.resets.get() + 1);
    }

    extern "C" fn find_vqs(
        vdev: *mut bindings::virtio_device,
        count: c_uint,
        vqs: *mut *mut bindings::virtqueue,
        infos: *mut bindings::virtqueue_info,
        _affinity: *mut bindings::irq_affinity,
    ) -> c_int {
        // SAFETY: The bus passes a test device.
        let device = unsafe { Self::from_vdev(vdev) };
        if device.find_vqs_fails.take() || count as usize > QUEUES {
            return ENOENT.to_errno();
        }
        for index in 0..count as usize {
            // SAFETY: Both arrays have `count` elements. The memory of the ring has the required
            // size and alignment, and is not used by an earlier ring.
            unsafe {
                device.memory[index].0.get().write_bytes(0, 1);
                device.last_avail_idx[index].set(0);
                device.used[index].set(0);
                let info = &*infos.add(index);
                let ring = bindings::vring_new_virtqueue(
                    index as c_uint,
                    device.entries.get() as c_uint,
                    4096,
                    vdev,
                    true,
                    false,
                    device.memory[index].0.get().cast(),
                    Some(Self::notify),
                    info.callback,
                    info.name,
                );
                device.rings[index].set(ring);
                if ring.is_null() {
                    Self::del_vqs(vdev);
                    return ENOMEM.to_errno();
                }
                vqs.add(index).write(ring);
            }
        }
        0
    }

    extern "C" fn del_vqs(vdev: *mut bindings::virtio_device) {
        // SAFETY: The bus passes a test device.
        let device = unsafe { Self::from_vdev(vdev) };
        for ring in &device.rings {
            let ring = ring.replace(ptr::null_mut());
            if !ring.is_null() {
                // SAFETY: `find_vqs` created the ring, and the pointer was cleared.
                unsafe { bindings::vring_del_virtqueue(ring) };
            }
        }
        device
            .drops_at_del_vqs
            .set(device.drops.get().map(|drops| drops.load(Relaxed)));
    }

    extern "C" fn notify(vq: *mut bindings::virtqueue) -> bool {
        // SAFETY: The ring calls this with its own virtqueue, which belongs to a test device.
        let (device, queue) = unsafe { (Self::from_vdev((*vq).vdev), (*vq).index as usize) };
        device.notifications.set(device.notifications.get() + 1);
        while device.use_on_notify.get() {
            let Some(word) = device.use_buffer(queue) else {
                break;
            };
            let mut used_log = device.used_log.get();
            if let Some(slot) = used_log.get_mut(device.used_log_len.get()) {
                *slot = (queue, word);
                device.used_log.set(used_log);
                device.used_log_len.set(device.used_log_len.get() + 1);
            }
        }
        !device.notify_fails.get()
    }
}

/// A buffer with any segments, which counts its drops.
pub(super) struct DropCountedBuffer(KBox<Body>);

pub(super) struct Body {
    pub(super) number: u64,
    written: UnsafeCell<u64>,
    layout: SegmentLayout,
    drops: &'static AtomicU32,
}

/// The segments of a [`DropCountedBuffer`].
#[derive(Clone, Copy)]
pub(super) enum SegmentLayout {
    /// This number of segments that the device reads, and of segments that it writes.
    Segments(usize, usize),
    /// One empty segment.
    Empty,
    /// A segment that the device writes before one that it reads.
    WrongOrder,
}

impl DropCountedBuffer {
    pub(super) fn new(number: u64, drops: &'static AtomicU32) -> Result<Self> {
        Self::with_layout(number, SegmentLayout::Segments(1, 0), drops)
    }

    pub(super) fn with_layout(
        number: u64,
        layout: SegmentLayout,
        drops: &'static AtomicU32,
    ) -> Result<Self> {
        let body = Body {
            number,
            written: UnsafeCell::new(0),
            layout,
            drops,
        };
        Ok(Self(KBox::new(body, GFP_KERNEL)?))
    }

    pub(super) fn number(&self) -> u64 {
        self.0.number
    }

    pub(super) fn written(&self) -> u64 {
        // SAFETY: The device does not write while the driver owns the buffer.
        unsafe { *self.0.written.get() }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Relaxed);
    }
}

// SAFETY: Only the owner of the buffer uses `written`.
unsafe impl Send for Body {}

// SAFETY: The segments are within the memory of a box, whose pointer is the token. The device reads
// `number` and writes `written`, which no other code uses meanwhile. Such a box is aligned to at
// least 8 bytes.
unsafe impl Buffer for DropCountedBuffer {
    const TOKEN_TAG_BITS: u32 = 3;

    fn describe(&self, segments: &mut Segments) {
        let number = NonNull::from(&self.0.number).cast();
        let written = NonNull::from(&self.0.written).cast();
        match self.0.layout {
            SegmentLayout::Segments(readable, writable) => {
                for _ in 0..readable {
                    segments.readable(number, 8);
                }
                for _ in 0..writable {
                    segments.writable(written, 8);
                }
            }
            SegmentLayout::Empty => segments.readable(number, 0),
            SegmentLayout::WrongOrder => {
                segments.writable(written, 8);
                segments.readable(number, 8);
            }
        }
    }

    fn into_token(self) -> NonNull<c_void> {
        NonNull::from(KBox::leak(self.0)).cast()
    }

    unsafe fn from_token(token: NonNull<c_void>) -> Self {
        // SAFETY: The token comes from the box that `into_token` leaked.
        Self(unsafe { KBox::from_raw(token.cast().as_ptr()) })
    }
}

/// Waits until `done` returns `true`, for at most 10 seconds. Returns whether it did.
pub(crate) fn wait_for(mut done: impl FnMut() -> bool) -> bool {
    (0..1000).any(|_| {
        let done = done();
        if !done {
            fsleep(Delta::from_millis(10));
        }
        done
    })
}

/// A handler that counts its calls.
pub(crate) struct CountingHandler(pub(super) [AtomicU32; QUEUES]);

impl CountingHandler {
    pub(crate) fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(
            Self([const { AtomicU32::new(0) }; QUEUES]),
            GFP_KERNEL,
        )?)
    }

    pub(super) fn used_count(&self, queue: usize) -> u32 {
        self.0[queue].load(Relaxed)
    }
}

impl QueueHandler for CountingHandler {
    fn used(&self, queue: u16) {
        self.0[usize::from(queue)].fetch_add(1, Relaxed);
    }
}

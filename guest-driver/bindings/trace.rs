// SPDX-License-Identifier: GPL-2.0

//! The module's tracepoints, defined in `virtio_balloon_rs_trace.h`.
//!
//! Nothing but a call if the event is not enabled, or if the kernel has no tracepoints. All may be
//! called in any context but NMI.

use core::ptr;

use kernel::device::Device;
use kernel::prelude::*;
use kernel::sync::aref::ARef;

/// Whose events they are: those of a device, or of nobody in a test.
pub(crate) struct Tracer(Option<ARef<Device>>);

impl Tracer {
    /// For the events of `device`.
    pub(crate) fn new(device: Option<ARef<Device>>) -> Self {
        Self(device)
    }

    fn device(&self) -> *const super::device {
        let device = self.0.as_ref();
        // A `Device` is a transparent wrapper of the C structure.
        device.map_or(ptr::null(), |device| ptr::from_ref::<Device>(device).cast())
    }

    /// A request was sent on a queue.
    pub(crate) fn request(&self, queue: &CStr, pages: u64) {
        // SAFETY: The device is null or valid, and the string ends with a NUL.
        unsafe { super::vbrs_trace_request(self.device(), queue.as_char_ptr(), pages) };
    }

    /// The device has used a request.
    pub(crate) fn acknowledge(&self, queue: &CStr, pages: u64) {
        // SAFETY: As above.
        unsafe { super::vbrs_trace_acknowledge(self.device(), queue.as_char_ptr(), pages) };
    }

    /// A round of hinting begins.
    pub(crate) fn hint_start(&self, id: u32, reserve: u64) {
        // SAFETY: The device is null or valid.
        unsafe { super::vbrs_trace_hint_start(self.device(), id, reserve) };
    }

    /// A block was offered.
    pub(crate) fn hint_block(&self, address: u64, order: u32) {
        // SAFETY: As above.
        unsafe { super::vbrs_trace_hint_block(self.device(), address, order) };
    }

    /// A round of hinting has ended.
    pub(crate) fn hint_stop(&self, microseconds: u64) {
        // SAFETY: As above.
        unsafe { super::vbrs_trace_hint_stop(self.device(), microseconds) };
    }

    /// The guest took a block back.
    pub(crate) fn hint_return(&self, pages: u64) {
        // SAFETY: As above.
        unsafe { super::vbrs_trace_hint_return(self.device(), pages) };
    }

    /// Free pages were reported.
    pub(crate) fn report(&self, blocks: u32, pages: u64, acknowledged: bool) {
        // SAFETY: As above.
        unsafe { super::vbrs_trace_report(self.device(), blocks, pages, acknowledged) };
    }
}

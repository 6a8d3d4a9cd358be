// SPDX-License-Identifier: GPL-2.0

//! The tracepoints of the module, defined in `virtio_balloon_rs_trace.h`.
//!
//! A disabled tracepoint costs one call. The same holds for kernels without tracepoints. All
//! methods may be called in any context but NMI.

use core::ptr;

use kernel::device::Device;
use kernel::prelude::*;
use kernel::sync::aref::ARef;

/// The source of trace events: a device, or none in a test.
pub(crate) struct Tracer(Option<ARef<Device>>);

impl Tracer {
    /// Creates the source of the trace events of `device`.
    pub(crate) fn new(device: Option<ARef<Device>>) -> Self {
        Self(device)
    }

    fn device(&self) -> *const super::device {
        let device = self.0.as_ref();
        // `Device` is a transparent wrapper of the C structure.
        device.map_or(ptr::null(), |device| ptr::from_ref::<Device>(device).cast())
    }

    /// Traces a request that was sent on an inflate or deflate queue, and its balloon pages.
    pub(crate) fn request(&self, queue: &CStr, pages: u64) {
        // SAFETY: The device is null or valid, and the string is NUL-terminated.
        unsafe { super::vbrs_trace_request(self.device(), queue.as_char_ptr(), pages) };
    }

    /// Traces a request that the device has used, and its balloon pages.
    pub(crate) fn acknowledge(&self, queue: &CStr, pages: u64) {
        // SAFETY: The device is null or valid, and the string is NUL-terminated.
        unsafe { super::vbrs_trace_acknowledge(self.device(), queue.as_char_ptr(), pages) };
    }

    /// Traces the start of a hint round, with its command id and its reserve in pages.
    pub(crate) fn hint_start(&self, id: u32, reserve: u64) {
        // SAFETY: The device is null or valid.
        unsafe { super::vbrs_trace_hint_start(self.device(), id, reserve) };
    }

    /// Traces a free block that was hinted.
    pub(crate) fn hint_block(&self, address: u64, order: u32) {
        // SAFETY: The device is null or valid.
        unsafe { super::vbrs_trace_hint_block(self.device(), address, order) };
    }

    /// Traces the end of a hint round, and its duration.
    pub(crate) fn hint_stop(&self, microseconds: u64) {
        // SAFETY: The device is null or valid.
        unsafe { super::vbrs_trace_hint_stop(self.device(), microseconds) };
    }

    /// Traces hinted pages that the shrinker reclaimed.
    pub(crate) fn hint_return(&self, pages: u64) {
        // SAFETY: The device is null or valid.
        unsafe { super::vbrs_trace_hint_return(self.device(), pages) };
    }

    /// Traces a report of free pages, and whether the device acknowledged it.
    pub(crate) fn report(&self, blocks: u32, pages: u64, acknowledged: bool) {
        // SAFETY: The device is null or valid.
        unsafe { super::vbrs_trace_report(self.device(), blocks, pages, acknowledged) };
    }
}

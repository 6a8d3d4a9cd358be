// SPDX-License-Identifier: GPL-2.0

//! Bindings to the kernel headers that [`kernel::bindings`] omits. bindgen generates them when the
//! module is built.
//!
//! Only `virtio/` and `mm/` use them. The exception is [`trace`], which is safe.

#![allow(
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused_imports
)]

pub(crate) mod trace;

include!(env!("VIRTIO_BALLOON_RS_BINDINGS"));

// SPDX-License-Identifier: GPL-2.0

//! The guest driver of a virtio memory balloon.
//!
//! | module | contents |
//! |---|---|
//! | [`shared_abi`] | the driver-device ABI; the host compiles the same files |
//! | [`virtio`] | safe bindings for virtio drivers, independent of the balloon |
//! | [`mm`] | safe bindings for the memory management that a balloon needs |
//! | [`balloon`] | the driver |
//!
//! Only `virtio`, `mm` and the bindings below them contain unsafe code.

#![deny(unsafe_code)]

pub mod balloon;
#[allow(unsafe_code)]
mod bindings;
#[cfg(CONFIG_KUNIT = "y")]
mod kunit_shared_abi;
#[allow(unsafe_code)]
pub mod mm;
#[path = "../shared-abi/src/lib.rs"]
pub mod shared_abi;
#[allow(unsafe_code)]
pub mod virtio;

module_virtio_driver! {
    type: balloon::Balloon,
    name: "virtio_balloon_rs",
    authors: ["the virtio-balloon-rs authors"],
    description: "Virtio balloon driver in Rust, with free page hinting",
    license: "GPL",
    params: {
        hint_min_order: u8 {
            default: 4,
            description: "Smallest order of free blocks to hint (4 KiB << order; 0 to 10, default 4)",
        },
        host_timeout_ms: u32 {
            default: 2000,
            description: "Timeout in milliseconds for a host that makes no progress (1 to 600000, default 2000)",
        },
        hint_reserve_mib: u32 {
            default: 0,
            description: "Free memory in MiB that hinting leaves to the guest (default 0: from the zones' watermarks; at least half-way between minimum and low)",
        },
    },
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The version and the limits of the format.

/// The format version of a sent stream. A receiver accepts no other version.
pub const VERSION: u32 = 1;
/// The maximum number of channels of a stream.
pub const CHANNELS_MAX: u16 = 64;
/// The maximum number of pages in a record that carries page content.
pub const RECORD_PAGES: u64 = 256;
/// The maximum length of the message in a receiver's answer, in bytes.
pub const MESSAGE_MAX: u16 = 1024;

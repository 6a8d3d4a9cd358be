// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The format of a stream: encodes and decodes headers, records and answers as `docs/stream.md` describes them.
//!
//! This module does no I/O. Decoding checks lengths, flags and reserved fields. The decoder of a channel checks the
//! rest, which depends on the RAM blocks and on earlier records.

mod answer;
mod fields;
mod final_record;
mod header;
mod limits;
mod record;

pub(super) use answer::{Answer, ANSWER_FIXED};
pub(super) use final_record::{stream_digest, Final, StreamCounts, Totals};
pub(super) use header::{RamBlockEntry, StreamHeader, HEADER_START};
pub use limits::{CHANNELS_MAX, MESSAGE_MAX, RECORD_PAGES, VERSION};
pub(super) use record::{
    page_bytes, payload_checksum, RecordHeader, RecordKind, FLAG_NO_CHECKSUM, FLAG_ZSTD,
    RECORD_HEADER_SIZE,
};

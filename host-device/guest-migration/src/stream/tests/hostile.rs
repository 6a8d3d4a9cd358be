// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Malformed streams: damaged, truncated or with forged fields.

use std::io::{IoSliceMut, Write};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::Duration;

use proptest::prelude::*;

use super::super::decoder::{ByteSource, Decoder, Record};
use super::super::format::{
    payload_checksum, stream_digest, Final, RamBlockEntry, RecordHeader, RecordKind, StreamCounts,
    StreamHeader, Totals, FLAG_NO_CHECKSUM, FLAG_ZSTD, RECORD_HEADER_SIZE,
};
use super::*;

const PAGES: [u64; 2] = [40, 3];

/// Builds streams of one channel. A stream is valid unless the test changes one of its parts.
#[derive(Clone)]
struct Forge {
    header: StreamHeader,
    chain: u64,
    sequence: u64,
    iterations: u64,
    counts: StreamCounts,
    /// The stream header, then each record.
    parts: Vec<Vec<u8>>,
}

impl Forge {
    fn new() -> Self {
        let names = NAMES.iter().zip(PAGES).map(|(name, pages)| RamBlockEntry {
            name: (*name).into(),
            pages,
        });
        Self::with_header(StreamHeader {
            answers: false,
            id: [7; 16],
            channel: 0,
            channels: 1,
            seed: 5,
            blocks: names.collect(),
        })
    }

    fn with_header(header: StreamHeader) -> Self {
        let (bytes, chain) = header.encode().unwrap();
        Self {
            header,
            chain,
            sequence: 0,
            iterations: 0,
            counts: StreamCounts::default(),
            parts: vec![bytes],
        }
    }

    /// Adds a record whose header `change` has changed. The checksum of the header is valid.
    fn forged(&mut self, change: impl FnOnce(&mut RecordHeader), payload: &[u8]) {
        let mut head = RecordHeader {
            kind: RecordKind::Pages,
            flags: 0,
            block: 0,
            length: payload.len() as u32,
            sequence: self.sequence,
            first: 0,
            pages: payload.len() as u64 / PAGE_SIZE,
            payload_checksum: payload_checksum(payload),
        };
        change(&mut head);
        let mut bytes = head.encode(&mut self.chain).to_vec();
        bytes.extend(payload);
        self.sequence += 1;
        self.parts.push(bytes);
    }

    fn pages(&mut self, run: PageRun, bytes: &[u8]) {
        self.counts.add(StreamCounts {
            pages: run.pages,
            zeros: 0,
            payload: bytes.len() as u64,
        });
        let dir =
            |head: &mut RecordHeader| (head.block, head.first) = (run.block as u16, run.first);
        self.forged(dir, bytes);
    }

    fn zeros(&mut self, run: PageRun) {
        self.counts.zeros += run.pages;
        self.forged(
            |head| {
                head.kind = RecordKind::Zeros;
                (head.block, head.first, head.pages) = (run.block as u16, run.first, run.pages);
                head.payload_checksum = 0;
            },
            &[],
        );
    }

    fn iteration(&mut self) {
        self.iterations += 1;
        let iteration = self.iterations;
        self.forged(
            |head| {
                (head.kind, head.first, head.payload_checksum) =
                    (RecordKind::IterationEnd, iteration, 0)
            },
            &[],
        );
    }

    fn finish(&mut self, change: impl FnOnce(&mut Final)) {
        let mut last = Final {
            counts: self.counts,
            totals: Totals {
                counts: self.counts,
                content: None,
                stream: stream_digest([self.chain]),
            },
        };
        change(&mut last);
        let iterations = self.iterations;
        self.forged(
            |head| (head.kind, head.first, head.pages) = (RecordKind::Final, iterations, 0),
            &last.encode(),
        );
    }

    fn bytes(&self) -> Vec<u8> {
        self.parts.concat()
    }

    /// Returns a valid stream with every kind of record.
    fn example() -> Self {
        let mut forge = Self::new();
        forge.pages(run(0, 3, 1), &[1; PAGE]);
        forge.zeros(run(1, 0, 3));
        forge.iteration();
        forge.pages(run(1, 2, 1), &[2; PAGE]);
        forge.iteration();
        forge.finish(|_| {});
        forge
    }
}

struct Slice<'a> {
    rest: &'a [u8],
    /// The maximum number of bytes of one read.
    piece: usize,
}

impl ByteSource for Slice<'_> {
    fn read(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
        _: Option<Duration>,
    ) -> Result<usize, StreamError> {
        let (mut rest, _) = self.rest.split_at(self.rest.len().min(self.piece));
        let count = std::io::Read::read_vectored(&mut rest, slices).unwrap();
        self.rest = &self.rest[count..];
        Ok(count)
    }
}

/// Decodes `bytes` in reads of at most `piece` bytes. Returns the number of records before the end, and the error.
fn decode(bytes: &[u8], piece: usize) -> (usize, Option<StreamError>) {
    let source = Slice { rest: bytes, piece };
    let mut decoder = Decoder::new(source, Duration::from_secs(1));
    if let Err(error) = decoder.header() {
        return (0, Some(error));
    }
    let mut records = 0;
    loop {
        match decoder.next() {
            Ok(Record::Final(..)) => return (records, decoder.expect_end().err()),
            Ok(Record::Pages(run, bytes)) => assert_eq!(bytes.len() as u64, run.length()),
            Ok(_) => {}
            Err(error) => return (records, Some(error)),
        }
        records += 1;
    }
}

/// Receives a file of `bytes`. Asserts that the receiver fails and leaves its marker with the reason.
///
/// Returns the offset and the fault.
fn refused(dir: &TestDir, bytes: &[u8]) -> (u64, Fault) {
    std::fs::write(dir.path("stream"), bytes).unwrap();
    let (_, receiving) = dir.receive(&dir.address("file"));
    let error = receiving.end().unwrap_err();
    assert!(dir.marked(), "{error}");
    let words = std::fs::read_to_string(Destination::marker(&dir.path("ram"))).unwrap();
    assert!(words.contains(&error.to_string()), "{words}: {error}");
    match error {
        StreamError::Malformed {
            channel: 0,
            offset,
            fault,
        } => (offset, fault),
        error => panic!("{error}"),
    }
}

fn refused_alone(forge: &Forge) -> (u64, Fault) {
    refused(&TestDir::new(), &forge.bytes())
}

#[test]
fn the_example_is_right_whichever_way_it_comes() {
    let bytes = Forge::example().bytes();
    for piece in [1, 7, 48, 4096, usize::MAX] {
        let (records, error) = decode(&bytes, piece);
        assert!(error.is_none(), "{error:?}");
        assert_eq!(records, 5);
    }
    let dir = TestDir::new();
    std::fs::write(dir.path("stream"), &bytes).unwrap();
    let (_, receiving) = dir.receive(&dir.address("file"));
    assert_eq!(receiving.end().unwrap().iterations, 2);
    assert!(!dir.marked());
    assert!(dir.content(0).0[3 * PAGE..4 * PAGE]
        .iter()
        .all(|byte| *byte == 1));
    assert!(dir.content(1).0[2 * PAGE..].iter().all(|byte| *byte == 2));
}

#[test]
fn cut_at_any_byte_it_is_incomplete() {
    let forge = Forge::example();
    let bytes = forge.bytes();
    let dir = TestDir::new();
    // The offset of each part.
    let mut starts = vec![0];
    for part in &forge.parts {
        starts.push(starts[starts.len() - 1] + part.len());
    }
    for end in 0..bytes.len() {
        let part = starts.iter().rposition(|start| *start <= end).unwrap();
        let inside = end - starts[part];
        let (offset, fault) = refused(&dir, &bytes[..end]);
        if part == 0 {
            assert_eq!(fault, Fault::TruncatedHeader, "cut at {end}");
        } else if inside == 0 {
            assert_eq!((offset, fault), (end as u64, Fault::MissingFinalRecord));
        } else {
            assert_eq!(fault, Fault::TruncatedRecord, "cut at {end}");
            let head = starts[part] as u64;
            assert!(
                offset == head || offset == head + RECORD_HEADER_SIZE as u64,
                "cut at {end}"
            );
        }
    }
}

#[test]
fn a_change_of_any_byte_is_found() {
    let forge = Forge::example();
    let bytes = forge.bytes();
    let mut at = 0;
    for part in &forge.parts {
        for inside in 0..part.len() {
            for bit in [0x01, 0x80] {
                let mut changed = bytes.clone();
                changed[at + inside] ^= bit;
                let (_, error) = decode(&changed, usize::MAX);
                let Some(StreamError::Malformed { offset, .. }) = error else {
                    panic!("byte {} passed: {error:?}", at + inside);
                };
                assert!(offset <= (at + inside) as u64);
                assert!(
                    offset >= at as u64,
                    "byte {} found at {offset}",
                    at + inside
                );
            }
        }
        at += part.len();
    }
}

#[test]
fn swapped_repeated_and_missing_records_are_found() {
    let forge = Forge::example();
    let last = forge.parts.len() - 1;
    let dir = TestDir::new();
    for one in 1..=last {
        let before: usize = forge.parts[..one].iter().map(Vec::len).sum();
        let mut repeated = forge.clone();
        repeated.parts.insert(one, forge.parts[one].clone());
        let (offset, fault) = refused(&dir, &repeated.bytes());
        let after = before + forge.parts[one].len();
        assert_eq!(offset, after as u64);
        let expected = match one == last {
            true => Fault::TrailingData,
            false => Fault::RecordChecksum,
        };
        assert_eq!(fault, expected);

        let mut missing = forge.clone();
        missing.parts.remove(one);
        let (offset, fault) = refused(&dir, &missing.bytes());
        assert_eq!(offset, before as u64);
        let expected = match one == last {
            true => Fault::MissingFinalRecord,
            false => Fault::RecordChecksum,
        };
        assert_eq!(fault, expected);

        for other in one + 1..=last {
            let mut swapped = forge.clone();
            swapped.parts.swap(one, other);
            let found = refused(&dir, &swapped.bytes());
            assert_eq!(found, (before as u64, Fault::RecordChecksum));
        }
    }
    // A record of another migration with the same RAM blocks.
    let mut other = Forge::new();
    other.header.id = [8; 16];
    let mut other = Forge::with_header(other.header);
    other.pages(run(0, 3, 1), &[1; PAGE]);
    let mut mixed = forge.clone();
    mixed.parts[1] = other.parts[1].clone();
    assert_eq!(refused(&dir, &mixed.bytes()).1, Fault::RecordChecksum);
}

#[test]
fn headers_that_cannot_be() {
    let forge = Forge::new();
    let header = &forge.parts[0];
    let dir = TestDir::new();
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = header.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        let end = changed.len() - 8;
        let check = xxhash_rust::xxh3::xxh3_64(&changed[..end]);
        changed[end..].copy_from_slice(&check.to_le_bytes());
        changed
    };
    let name = 64 + 10;
    for (changed, fault) in [
        (with(0, b"QEVM\0\0\0\x03"), Fault::Magic(*b"QEVM\0\0\0\x03")),
        (with(8, &2u32.to_le_bytes()), Fault::Version(2)),
        (
            with(12, &u32::MAX.to_le_bytes()),
            Fault::HeaderLength(u32::MAX),
        ),
        (with(12, &16u32.to_le_bytes()), Fault::HeaderLength(16)),
        (with(16, &65536u32.to_le_bytes()), Fault::PageSize(65536)),
        (with(20, &0x10u32.to_le_bytes()), Fault::HeaderFlags(0x10)),
        (
            with(40, &[1, 0, 1, 0]),
            Fault::Channels {
                channel: 1,
                channels: 1,
            },
        ),
        (
            with(40, &[0, 0, 0xff, 0xff]),
            Fault::Channels {
                channel: 0,
                channels: u16::MAX,
            },
        ),
        // A file carries one channel only.
        (
            with(40, &[0, 0, 2, 0]),
            Fault::Channels {
                channel: 0,
                channels: 2,
            },
        ),
        (with(44, &0u32.to_le_bytes()), Fault::RamBlockCount(0)),
        (
            with(44, &u32::MAX.to_le_bytes()),
            Fault::RamBlockCount(u32::MAX),
        ),
        (with(44, &1u32.to_le_bytes()), Fault::HeaderContent),
        (with(44, &3u32.to_le_bytes()), Fault::HeaderContent),
        (with(56, &[1]), Fault::Reserved),
        (
            with(64, &0u64.to_le_bytes()),
            Fault::RamBlockPages { block: 0, pages: 0 },
        ),
        (
            with(64, &u64::MAX.to_le_bytes()),
            Fault::RamBlockPages {
                block: 0,
                pages: u64::MAX,
            },
        ),
        (with(72, &0u16.to_le_bytes()), Fault::RamBlockName(0)),
        (with(72, &u16::MAX.to_le_bytes()), Fault::HeaderContent),
        (with(name, &[0xff]), Fault::RamBlockName(0)),
        (with(name, b"vga"), Fault::RamBlockName(1)),
        (with(20, &1u32.to_le_bytes()), Fault::OneWay),
    ] {
        assert_eq!(refused(&dir, &changed), (0, fault));
    }
    let version = Fault::Version(2).to_string();
    assert!(
        version.contains("version 2") && version.contains("version 1"),
        "{version}"
    );
    let mut damaged = header.clone();
    damaged[30] ^= 1;
    assert_eq!(refused(&dir, &damaged), (0, Fault::HeaderChecksum));
    // A receiver that accepts no header creates no memory files.
    assert!(!dir.path("ram").exists());
}

#[test]
fn heads_that_lie_are_refused_where_they_stand() {
    let page = [1; PAGE];
    let outside = |first, pages| Fault::Outside {
        first,
        pages,
        has: PAGES[0],
    };
    let length = |length, pages| Fault::Length { length, pages };
    let flags = |kind, flags| Fault::Flags { kind, flags };
    type Lie = fn(&mut RecordHeader);
    let lies: &[(Lie, &[u8], Fault)] = &[
        (|it| it.block = 2, &page, Fault::RamBlock(2)),
        (|it| it.block = u16::MAX, &page, Fault::RamBlock(u16::MAX)),
        (|it| it.first = 40, &page, outside(40, 1)),
        (|it| it.first = u64::MAX, &page, outside(u64::MAX, 1)),
        (|it| it.pages = 0, &page, Fault::Pages(0)),
        (|it| it.pages = 257, &page, Fault::Pages(257)),
        (|it| it.pages = u64::MAX, &page, Fault::Pages(u64::MAX)),
        (|it| it.pages = 2, &page, length(4096, 2)),
        (|it| it.length = u32::MAX, &page, length(u32::MAX, 1)),
        (|it| it.length = 0, &page, length(0, 1)),
        (|it| it.sequence = 9, &page, Fault::Sequence(9, 0)),
        (|it| it.flags = 0x80, &page, flags(1, 0x80)),
        (
            |it| it.flags = FLAG_ZSTD | FLAG_NO_CHECKSUM,
            &page,
            flags(1, 3),
        ),
        (|it| it.flags = FLAG_ZSTD, &page, length(4096, 1)),
        (|it| it.flags = FLAG_NO_CHECKSUM, &page, Fault::Reserved),
        (|it| it.payload_checksum ^= 1, &page, Fault::PayloadChecksum),
        (
            |it| (it.kind, it.pages, it.payload_checksum) = (RecordKind::Zeros, 41, 0),
            &[],
            outside(0, 41),
        ),
        (
            |it| {
                (it.kind, it.first, it.pages, it.payload_checksum) =
                    (RecordKind::Zeros, 2, u64::MAX, 0)
            },
            &[],
            outside(2, u64::MAX),
        ),
        (
            |it| (it.kind, it.payload_checksum) = (RecordKind::Zeros, 0),
            &[],
            Fault::Pages(0),
        ),
        (|it| it.kind = RecordKind::Zeros, &page, length(4096, 1)),
        (
            |it| (it.kind, it.pages, it.payload_checksum) = (RecordKind::Zeros, 1, 1),
            &[],
            Fault::Reserved,
        ),
        (
            |it| (it.kind, it.pages, it.flags) = (RecordKind::Zeros, 1, 1),
            &[],
            flags(2, 1),
        ),
        (
            |it| (it.kind, it.payload_checksum, it.first) = (RecordKind::IterationEnd, 0, 2),
            &[],
            Fault::IterationEnd(2, 1),
        ),
        (
            |it| (it.kind, it.payload_checksum, it.first) = (RecordKind::IterationEnd, 0, 0),
            &[],
            Fault::IterationEnd(0, 1),
        ),
        (
            |it| (it.kind, it.payload_checksum, it.first) = (RecordKind::IterationEnd, 5, 1),
            &[],
            Fault::Reserved,
        ),
        (
            |it| it.kind = RecordKind::IterationEnd,
            &page,
            length(4096, 1),
        ),
        (|it| it.kind = RecordKind::Final, &page, length(4096, 1)),
        (
            |it| (it.kind, it.first) = (RecordKind::Final, 1),
            &[0; 96],
            Fault::Count {
                what: "iterations",
                said: 1,
                seen: 0,
            },
        ),
    ];
    let dir = TestDir::new();
    for (lie, payload, fault) in lies {
        let mut forge = Forge::new();
        forge.forged(lie, payload);
        if forge.parts[1][0] == 4 && fault != &length(4096, 1) {
            // The page count of a final record is 0.
            forge = Forge::new();
            forge.forged(
                |head| {
                    head.pages = 0;
                    lie(head);
                },
                payload,
            );
        }
        let start = forge.parts[0].len() as u64;
        assert_eq!(refused(&dir, &forge.bytes()), (start, fault.clone()));
    }
    // `RecordHeader` has no unknown kind, so the test changes the encoded byte.
    let mut forge = Forge::new();
    let chain = forge.chain;
    forge.forged(|_| {}, &page);
    forge.parts[1][0] = 9;
    let check = xxhash_rust::xxh3::xxh3_64_with_seed(&forge.parts[1][..40], chain);
    forge.parts[1][40..48].copy_from_slice(&check.to_le_bytes());
    assert_eq!(refused_alone(&forge).1, Fault::RecordKind(9));
}

#[test]
fn iterations_end_in_order_and_once() {
    for wrong in [1, 3, u64::MAX] {
        let mut forge = Forge::new();
        forge.iteration();
        forge.forged(
            |head| {
                (head.kind, head.first, head.payload_checksum) =
                    (RecordKind::IterationEnd, wrong, 0)
            },
            &[],
        );
        assert_eq!(refused_alone(&forge).1, Fault::IterationEnd(wrong, 2));
    }
}

/// A receiver that waited for the other channel would wait forever.
#[test]
fn a_channel_that_ends_before_the_others_iteration_is_a_fault() {
    for ended in 0..2 {
        let dir = TestDir::new();
        let (address, receiving) = dir.receive(&dir.address("unix"));
        let Address::Unix(path) = &address else {
            panic!("{address}")
        };
        let channels = [0, 1].map(|channel| {
            let header = StreamHeader {
                channel,
                channels: 2,
                ..Forge::new().header
            };
            let mut forge = Forge::with_header(header);
            if usize::from(channel) != ended {
                forge.iteration();
            }
            forge.finish(|_| {});
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(&forge.bytes()).unwrap();
            stream
        });
        let error = receiving.end().unwrap_err();
        let fault = Fault::IterationsDiffer;
        assert!(
            matches!(&error, StreamError::Malformed { fault: it, .. } if *it == fault),
            "{error}"
        );
        assert!(dir.marked());
        drop(channels);
    }
}

#[test]
fn final_counts_and_digests_must_add_up() {
    type Lie = fn(&mut Final);
    let lies: &[(Lie, &str)] = &[
        (|it| it.counts.pages += 1, "3 pages, the stream had 2"),
        (
            |it| it.counts.zeros = u64::MAX,
            "zero pages, the stream had 3",
        ),
        (|it| it.counts.payload -= 1, "8191 bytes of pages"),
        (
            |it| it.totals.counts.pages = 0,
            "0 pages on all channels, the stream had 2",
        ),
        (
            |it| it.totals.counts.zeros += 1,
            "4 zero pages on all channels",
        ),
        (
            |it| it.totals.counts.payload += 1,
            "bytes of pages on all channels",
        ),
        (|it| it.totals.stream ^= 1, "stream digest"),
    ];
    for (lie, words) in lies {
        let mut forge = Forge::example();
        let dir = TestDir::new();
        forge.parts.pop();
        // The same records, without the final one.
        let mut again = Forge::new();
        again.pages(run(0, 3, 1), &[1; PAGE]);
        again.zeros(run(1, 0, 3));
        again.iteration();
        again.pages(run(1, 2, 1), &[2; PAGE]);
        again.iteration();
        assert_eq!(forge.bytes(), again.bytes());
        again.finish(lie);
        let (offset, fault) = refused(&dir, &again.bytes());
        assert_eq!(offset as usize, forge.bytes().len());
        assert!(fault.to_string().contains(words), "{fault}");
    }
    let mut trailing = Forge::example().bytes();
    let end = trailing.len() as u64;
    trailing.push(0);
    assert_eq!(
        refused(&TestDir::new(), &trailing),
        (end, Fault::TrailingData)
    );
}

#[test]
fn another_content_than_the_senders_is_found() {
    let dir = TestDir::new();
    let mut forge = Forge::new();
    forge.pages(run(0, 0, 1), &[1; PAGE]);
    forge.finish(|last| last.totals.content = Some(1234));
    std::fs::write(dir.path("stream"), forge.bytes()).unwrap();
    let (_, receiving) = dir.receive(&dir.address("file"));
    let error = receiving.end().unwrap_err();
    assert!(
        matches!(error, StreamError::ContentMismatch { there: 1234, .. }),
        "{error}"
    );
    assert!(dir.marked());
}

#[test]
fn a_zstd_bomb_goes_off_in_a_bounded_place() {
    let bomb = zstd::bulk::compress(&vec![0; 256 << 20], 19).unwrap();
    assert!(bomb.len() < 64 << 10);
    let small = zstd::bulk::compress(&[1; 100], 1).unwrap();
    let two = [small.clone(), small.clone()].concat();
    for (packed, pages) in [(bomb, 256), (small, 1), (two, 1), (vec![1; 100], 1)] {
        let mut forge = Forge::new();
        forge.header.blocks[0].pages = 1000;
        let mut forge = Forge::with_header(forge.header);
        forge.forged(
            |head| (head.flags, head.pages) = (FLAG_ZSTD, pages),
            &packed,
        );
        let start = forge.parts[0].len() as u64;
        let (offset, fault) = refused_alone(&forge);
        assert_eq!(offset, start);
        assert!(matches!(fault, Fault::Compressed { .. }), "{fault}");
    }
}

#[test]
fn files_that_do_not_fit_say_what_to_do() {
    let dir = TestDir::new();
    std::fs::write(dir.path("stream"), Forge::example().bytes()).unwrap();
    let receive = |destination: Destination| {
        let listener = Listener::bind(&dir.address("file")).unwrap();
        let options = ReceiverOptions::default();
        Receiver::new(listener, destination, options).and_then(Receiver::run)
    };
    let (ram, vga) = (dir.path("ram"), dir.path("vga"));
    std::fs::write(&ram, [1; 5 * PAGE]).unwrap();
    let error = receive(dir.destination()).unwrap_err().to_string();
    assert!(
        error.contains("20480 bytes") && error.contains("163840"),
        "{error}"
    );
    assert!(error.contains("give a file of that size"), "{error}");
    assert!(dir.marked());
    assert_eq!(
        std::fs::read(&ram).unwrap(),
        [1; 5 * PAGE],
        "it was not touched"
    );
    std::fs::remove_file(&ram).unwrap();

    let error = receive(Destination::with_file(&ram))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("2 RAM blocks (ram, vga)") && error.contains("NAME=PATH"),
        "{error}"
    );
    let error = receive(Destination::new().with_ram_block("ram", &ram))
        .unwrap_err()
        .to_string();
    assert!(error.contains("block 'vga'"), "{error}");
    let unused = dir.destination().with_ram_block("rom", dir.path("rom"));
    let error = receive(unused).unwrap_err().to_string();
    assert!(
        error.contains("RAM block 'rom', which is not in the stream"),
        "{error}"
    );
    let twice = dir.destination().with_ram_block("ram", &vga);
    let error = receive(twice).unwrap_err().to_string();
    assert!(error.contains("two memory files"), "{error}");
    assert!(receive(Destination::new())
        .unwrap_err()
        .to_string()
        .contains("no memory file"));
    let error = receive(dir.destination().with_ram_block("ram2", "/nowhere/ram")).unwrap_err();
    assert!(
        error.to_string().contains("/nowhere/ram.incomplete"),
        "{error}"
    );
    std::os::unix::fs::symlink("/dev/null", &ram).unwrap();
    let error = receive(dir.destination()).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    std::fs::remove_file(&ram).unwrap();

    let busy = dir.path("stream");
    let address = format!("fd:{}", 1 << 30).parse().unwrap();
    let error = Listener::bind(&address).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot receive at fd:1073741824"),
        "{error}"
    );
    let listener = Listener::bind(&Address::File(busy)).unwrap();
    let options = ReceiverOptions::default();
    let first = Receiver::new(listener, dir.destination(), options).unwrap();
    let error = receive(dir.destination()).unwrap_err().to_string();
    assert!(error.contains("in use by another receiver"), "{error}");
    first.run().unwrap();
    assert!(!dir.marked());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Random bytes after a valid header are an error.
    #[test]
    fn garbage_after_a_header_is_an_error(
        garbage in prop::collection::vec(any::<u8>(), 0..300),
        piece in 1usize..100,
    ) {
        let mut bytes = Forge::new().bytes();
        bytes.extend(garbage);
        let (records, error) = decode(&bytes, piece);
        prop_assert_eq!(records, 0);
        prop_assert!(error.is_some());
    }

    #[test]
    fn heads_with_right_check_values_and_any_content(
        fields in prop::collection::vec(
            (0u8..6, any::<u8>(), 0u16..4, any::<u32>(), 0u64..3, any::<u64>(), any::<u64>(), any::<u64>()),
            1..8,
        ),
        small in any::<bool>(),
        payload in 0usize..9000,
    ) {
        let forge = Forge::new();
        let mut bytes = forge.bytes();
        let mut chain = forge.chain;
        for (index, (kind, flags, block, length, sequence, first, pages, check)) in fields.into_iter().enumerate() {
            let (first, pages, length) = match small {
                true => (first % 50, pages % 50, length % 5 * 4096),
                false => (first, pages, length),
            };
            let mut head = vec![kind, if small { flags & 3 } else { flags }];
            head.extend(block.to_le_bytes());
            head.extend(length.to_le_bytes());
            head.extend((index as u64 + sequence % 2 * u64::from(!small)).to_le_bytes());
            head.extend(first.to_le_bytes());
            head.extend(pages.to_le_bytes());
            head.extend(check.to_le_bytes());
            chain = xxhash_rust::xxh3::xxh3_64_with_seed(&head, chain);
            head.extend(chain.to_le_bytes());
            bytes.extend(head);
            bytes.extend(std::iter::repeat_n(0x28, payload));
        }
        // Decoding always ends with an error, because no final record has a valid payload.
        let (_, error) = decode(&bytes, usize::MAX);
        prop_assert!(error.is_some());
    }

    #[test]
    fn streams_with_random_changes_are_errors(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..6),
    ) {
        static RIGHT: LazyLock<Vec<u8>> = LazyLock::new(|| Forge::example().bytes());
        let mut bytes = RIGHT.clone();
        for (at, change) in changes {
            let at = at.index(bytes.len());
            bytes[at] ^= change;
        }
        let (_, error) = decode(&bytes, 1000);
        prop_assert_eq!(error.is_none(), bytes == *RIGHT);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Target `stream`: what a sender of a migration writes, on every transport and with one to four channels.
//!
//! An input is a plan of a stream, with faults; or plain bytes for each channel; or calls of the real sender. The target
//! checks that a stream without a fault is received as a model of memory says, that a stream whose content digest is
//! verified has this content whatever its faults are, that the incomplete markers tell whether it is complete, and that
//! the same destination can receive an honest stream after a failure.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use guest_migration::stream::{
    Address, Compression, Destination, Listener, Received, Receiver, ReceiverOptions, StreamError,
    Writer, WriterOptions,
};
use guest_migration::{Layout, PageRun, RamBlock};
use rustix::pipe::{fcntl_setpipe_size, pipe_with, PipeFlags};
use tempfile::TempDir;

use crate::guest::rest_of;
use crate::stream_encoder::{
    content_digest, finish, Channel, Header, Patch, ANSWERS, ITERATION_END, NO_CHECKSUM, PAGE,
    PAGES, ZEROS, ZSTD,
};

/// The most records of one stream.
const RECORDS: usize = 24;
/// The most bytes of one channel: a socket and a pipe hold so much.
const CHANNEL_BYTES: usize = 96 << 10;
/// The most pages of a RAM block whose content is compared.
const SMALL: u64 = 64;
/// How long the receiver waits for bytes. All bytes are there before it starts, so a stream without a fault never waits.
const TIMEOUT: Duration = Duration::from_millis(1);

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum Transport {
    File,
    Pipe,
    Socket,
    Listener,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Payload {
    Plain,
    NoChecksum,
    Compressed,
    /// Several frames.
    Frames,
    /// A payload that decompresses to this many bytes more or less.
    WrongLength(i16),
    Garbage,
}

#[derive(Arbitrary, Debug)]
enum Record {
    Pages(u8, u8, u8, u8, Payload),
    Zeros(u8, u8, u8),
    IterationEnd,
    /// The end of an iteration on one channel only.
    IterationEndOn(u8),
    /// Any record header, with a valid checksum.
    Any(u8, u8, u16, u64, u64, Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Fault {
    /// Changes a byte, and keeps the checksum.
    Flip(u8, u16, u8),
    Truncate(u8, u16),
    Append(u8, Vec<u8>),
    /// Changes a byte of a header, before its checksum is computed.
    Header(u8, u16, u8),
    /// Changes a byte of a record header, before its checksum is computed.
    Record(u8, u8, u8),
    /// Changes a byte of a final record, before its checksum is computed.
    Final(u8, u8, u8),
    /// Leaves a channel out.
    Missing(u8),
    /// Sends a channel twice.
    Twice(u8),
}

#[derive(Arbitrary, Debug)]
struct Plan {
    transport: Transport,
    channels: u8,
    answers: bool,
    only_file: bool,
    seed: u64,
    content: bool,
    /// Pages of each RAM block, modulo [`SMALL`].
    blocks: [u8; 3],
    block_count: u8,
    /// A size for the first RAM block, instead.
    huge: Option<u64>,
}

/// The memory files of a receiver.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let shared = Path::new("/dev/shm");
        Self(match shared.is_dir() {
            true => tempfile::tempdir_in(shared).expect("a directory"),
            false => tempfile::tempdir().expect("a directory"),
        })
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn destination(&self, blocks: &[(String, u64)], only_file: bool) -> Destination {
        match blocks {
            [(name, _)] if only_file => Destination::with_file(self.path(name)),
            blocks => blocks.iter().fold(Destination::new(), |all, (name, _)| {
                all.with_ram_block(name, self.path(name))
            }),
        }
    }

    fn is_marked(&self, blocks: &[(String, u64)]) -> bool {
        let mut marks = blocks
            .iter()
            .map(|(name, _)| Destination::marker(&self.path(name)).exists());
        let first = marks.next().expect("at least one RAM block");
        assert!(marks.all(|mark| mark == first), "only some are marked");
        first
    }

    /// Receives the channels. Returns the result, and the answers on each channel.
    fn receive(
        &self,
        channels: &[Vec<u8>],
        transport: Transport,
        destination: Destination,
    ) -> (Result<Received, StreamError>, Vec<Vec<u8>>) {
        let first = channels.first().map_or(&[][..], Vec::as_slice);
        let mut peers = Vec::new();
        let listener = match transport {
            Transport::File => {
                let path = self.path("stream");
                fs::write(&path, first).expect("a file");
                Listener::bind(&Address::File(path)).expect("the file can be opened")
            }
            Transport::Pipe => {
                let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
                fcntl_setpipe_size(&writer, CHANNEL_BYTES).expect("a larger pipe");
                fs::File::from(writer).write_all(first).expect("room");
                Listener::from_fd(reader)
            }
            Transport::Socket => {
                let (ours, theirs) = UnixStream::pair().expect("a socket pair");
                send(&ours, first);
                peers.push(ours);
                Listener::from_fd(OwnedFd::from(theirs))
            }
            Transport::Listener => {
                let path = self.path("socket");
                let listener = Listener::bind(&Address::Unix(path.clone())).expect("a listener");
                for bytes in channels {
                    let ours = UnixStream::connect(&path).expect("room in the backlog");
                    send(&ours, bytes);
                    peers.push(ours);
                }
                listener
            }
        };
        let options = ReceiverOptions {
            accept_timeout: Some(TIMEOUT),
            timeout: TIMEOUT,
            ..ReceiverOptions::default()
        };
        let result = match Receiver::new(listener, destination, options) {
            Ok(receiver) => receiver.run(),
            Err(error) => Err(error),
        };
        let answers = peers.iter_mut().map(|peer| {
            let mut answers = Vec::new();
            // The receiver closes connections that it has not accepted, and resets them if bytes are unread.
            let _ = peer.read_to_end(&mut answers);
            answers
        });
        let answers = answers.collect();
        (result, answers)
    }

    /// Checks that the files have this content.
    fn check_content(&self, blocks: &[(String, u64)], model: &[Vec<u8>]) {
        for ((name, _), expected) in blocks.iter().zip(model) {
            let there = fs::read(self.path(name)).expect("a memory file");
            assert!(there == *expected, "RAM block {name} differs");
        }
    }
}

/// Sends a whole channel. The socket has room for it.
fn send(mut socket: &UnixStream, bytes: &[u8]) {
    socket.set_nonblocking(true).expect("a socket");
    socket.write_all(bytes).expect("room in the socket");
    socket.set_nonblocking(false).expect("a socket");
    socket.shutdown(Shutdown::Write).expect("a socket");
}

/// Returns the kinds of the answers in `bytes`, and checks their format.
fn answer_kinds(mut bytes: &[u8]) -> Vec<u8> {
    let mut kinds = Vec::new();
    while !bytes.is_empty() {
        let (fixed, rest) = bytes.split_at(8);
        assert_eq!(fixed[..4], *b"\x8dANS");
        let length = usize::from(u16::from_le_bytes([fixed[6], fixed[7]]));
        let (whole, check) = bytes.split_at(8 + length);
        let check: [u8; 8] = check[..8].try_into().expect("8 bytes");
        let expected = xxhash_rust::xxh3::xxh3_64(whole);
        assert_eq!(u64::from_le_bytes(check), expected);
        std::str::from_utf8(&whole[8..]).expect("a message of UTF-8");
        kinds.push(fixed[4]);
        bytes = &rest[length + 8..];
    }
    kinds
}

pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    // An input that is too short is a short stream.
    let _ = match u8::arbitrary(&mut input).unwrap_or(0) % 8 {
        0 => raw(&mut input),
        1 | 2 => honest(&mut input),
        _ => forged(&mut input),
    };
}

/// Receives plain bytes.
fn raw(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let transport = Transport::arbitrary(input)?;
    let blocks = [("ram".to_owned(), 0)];
    let place = Place::new();
    let rest = input.bytes(input.len().min(CHANNEL_BYTES))?;
    let (result, answers) = place.receive(
        &[rest.to_vec()],
        transport,
        place.destination(&blocks, true),
    );
    check_end(&place, &blocks, &result, &answers);
    Ok(())
}

fn check_end(
    place: &Place,
    blocks: &[(String, u64)],
    result: &Result<Received, StreamError>,
    answers: &[Vec<u8>],
) {
    assert_eq!(place.is_marked(blocks), result.is_err(), "{result:?}");
    let kinds: Vec<_> = answers.iter().map(|bytes| answer_kinds(bytes)).collect();
    match result {
        Ok(_) => {
            let complete = kinds.iter().flatten().filter(|kind| **kind == 3).count();
            assert!(complete <= 1, "{kinds:?}");
        }
        Err(error) => {
            assert!(error.to_string().len() < 1 << 17);
            let complete = kinds.iter().flatten().any(|kind| *kind == 3);
            assert!(!complete, "{error}: {kinds:?}");
            let path = Destination::marker(&place.path(&blocks[0].0));
            let reason = fs::read_to_string(path).expect("a marker");
            assert!(reason.contains(&error.to_string()), "{error}: {reason}");
        }
    }
}

/// Returns the content of `pages` pages.
fn content(fill: u8, pages: u64) -> Vec<u8> {
    let mut bytes = vec![fill; pages as usize * PAGE];
    if fill % 3 == 1 {
        // Incompressible, and different in each page.
        let mut state = u64::from(fill) + 1;
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
    }
    bytes
}

/// Returns a run inside a RAM block of `pages` pages.
fn run_in(pages: u64, first: u8, count: u8, most: u64) -> (u64, u64) {
    let first = u64::from(first) % pages;
    (first, 1 + u64::from(count) % most.min(pages - first))
}

impl Plan {
    fn blocks(&self) -> Vec<(String, u64)> {
        let count = 1 + usize::from(self.block_count % 3);
        let mut blocks: Vec<_> = ["ram", "vga", "höhe"]
            .iter()
            .zip(self.blocks)
            .take(count)
            .map(|(name, pages)| ((*name).to_owned(), 1 + u64::from(pages) % SMALL))
            .collect();
        if let Some(pages) = self.huge {
            // The largest RAM blocks take the receiver much time, so they are rare.
            let limit = if pages % 16 == 9 { 1 << 32 } else { 1 << 18 };
            for block in &mut blocks {
                block.1 = 1 + pages % limit;
            }
        }
        blocks
    }

    fn channels(&self) -> u16 {
        match self.transport {
            Transport::Listener => 1 + u16::from(self.channels % 4),
            _ => 1,
        }
    }
}

/// Guest memory as plain bytes.
struct Model(Vec<Vec<u8>>);

impl Model {
    fn new(blocks: &[(String, u64)]) -> Self {
        let small = |pages: u64| pages.min(SMALL) as usize * PAGE;
        Self(
            blocks
                .iter()
                .map(|(_, pages)| vec![0; small(*pages)])
                .collect(),
        )
    }

    fn write(&mut self, block: usize, first: u64, bytes: &[u8]) {
        let at = first as usize * PAGE;
        self.0[block][at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// Receives a stream that is encoded as planned.
fn forged(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let plan = Plan::arbitrary(input)?;
    let count = usize::from(u8::arbitrary(input)? % 4);
    let faults: Vec<Fault> = rest_of(input, count);
    let records: Vec<Record> = rest_of(input, RECORDS);
    let blocks = plan.blocks();
    let count = plan.channels();
    let two_way = matches!(plan.transport, Transport::Socket | Transport::Listener);
    let header = Header {
        flags: if plan.answers && two_way { ANSWERS } else { 0 },
        channels: count,
        seed: plan.seed,
        blocks: blocks.clone(),
    };
    let patches = |index: u16| -> Vec<Patch> {
        let of = faults.iter().filter_map(|fault| match fault {
            Fault::Header(channel, at, change) if u16::from(*channel) % count == index => {
                Some((usize::from(*at), *change))
            }
            _ => None,
        });
        of.collect()
    };
    let mut channels: Vec<_> = (0..count)
        .map(|index| Channel::new(&header, index, &patches(index)))
        .collect();
    let mut model = Model::new(&blocks);
    let (mut iterations, mut valid) = (0, faults.is_empty());
    for (number, record) in records.iter().enumerate() {
        let of = faults.iter().filter_map(|fault| match fault {
            Fault::Record(record, at, change) if usize::from(*record) == number => {
                Some((usize::from(*at), *change))
            }
            _ => None,
        });
        let patches: Vec<Patch> = of.collect();
        valid &= record.encode(&mut channels, &mut model, &mut iterations, &patches);
    }
    let small = plan.huge.is_none();
    let digest = plan.content.then(|| content_digest(plan.seed, &model.0));
    let of_final: Vec<Vec<Patch>> = (0..count)
        .map(|index| {
            let of = faults.iter().filter_map(|fault| match fault {
                Fault::Final(channel, at, change) if u16::from(*channel) % count == index => {
                    Some((usize::from(*at), *change))
                }
                _ => None,
            });
            of.collect()
        })
        .collect();
    finish(&mut channels, iterations, digest, &of_final);
    let counts = channels.iter().fold([0, 0], |[pages, zeros], channel| {
        [
            u64::wrapping_add(pages, channel.counts[0]),
            u64::wrapping_add(zeros, channel.counts[1]),
        ]
    });
    let mut streams: Vec<_> = channels.into_iter().map(|it| it.bytes).collect();
    for fault in &faults {
        fault.damage(&mut streams);
    }
    let place = Place::new();
    let destination = place.destination(&blocks, plan.only_file);
    let (result, answers) = place.receive(&streams, plan.transport, destination);
    check_end(&place, &blocks, &result, &answers);
    match &result {
        Ok(received) => {
            // A changed header may announce RAM blocks of other sizes.
            let sizes = small && !faults.iter().any(|it| matches!(it, Fault::Header(..)));
            if sizes && (valid || received.content_checked && digest.is_some()) {
                place.check_content(&blocks, &model.0);
            }
            if valid {
                let expected = (iterations, counts[0], counts[1], count);
                let seen = (
                    received.iterations,
                    received.pages,
                    received.zeros,
                    received.channels,
                );
                assert_eq!(seen, expected);
                assert_eq!(received.content_checked, digest.is_some());
            }
        }
        Err(error) if valid && small => panic!("a valid stream is refused: {error}"),
        Err(_) => check_honest_stream(&place, &blocks),
    }
    Ok(())
}

impl Record {
    /// Encodes the record. Returns whether it is valid.
    fn encode(
        &self,
        channels: &mut [Channel],
        model: &mut Model,
        iterations: &mut u64,
        patches: &[Patch],
    ) -> bool {
        let blocks = model.0.len();
        // The order of records of different channels is defined only between iterations.
        let index = |block: usize| (block + *iterations as usize) % channels.len();
        let pages_of = |block: usize| (model.0[block].len() / PAGE) as u64;
        match self {
            Self::Pages(block, first, pages, fill, payload) => {
                let block = usize::from(*block) % blocks;
                let (first, pages) = run_in(pages_of(block), *first, *pages, 8);
                let bytes = content(*fill, pages);
                let Some((flags, encoded, valid)) = payload.encode(&bytes) else {
                    return true;
                };
                let index = index(block);
                let channel = &mut channels[index];
                if channel.bytes.len() + encoded.len() > CHANNEL_BYTES - 256 {
                    return true;
                }
                let run = (first, pages);
                channel.record((PAGES, flags, block as u16), run, &encoded, patches);
                model.write(block, first, &bytes);
                valid
            }
            Self::Zeros(block, first, pages) => {
                let block = usize::from(*block) % blocks;
                let (first, pages) = run_in(pages_of(block), *first, *pages, SMALL);
                let index = index(block);
                channels[index].record((ZEROS, 0, block as u16), (first, pages), &[], patches);
                model.write(block, first, &content(0, pages));
                true
            }
            Self::IterationEnd => {
                *iterations += 1;
                for channel in channels {
                    channel.record((ITERATION_END, 0, 0), (*iterations, 0), &[], patches);
                }
                true
            }
            Self::IterationEndOn(channel) => {
                let index = usize::from(*channel) % channels.len();
                let run = (*iterations + 1, 0);
                channels[index].record((ITERATION_END, 0, 0), run, &[], patches);
                false
            }
            Self::Any(kind, flags, block, first, pages, payload) => {
                let payload = payload.get(..PAGE).unwrap_or(payload);
                let head = (kind % 6, flags % 8, *block % 4);
                channels[0].record(head, (*first, *pages), payload, patches);
                false
            }
        }
    }
}

impl Payload {
    /// Returns the flags, the payload of a record, and whether it is valid. `None` if the pages cannot be sent so.
    fn encode(self, bytes: &[u8]) -> Option<(u8, Vec<u8>, bool)> {
        let compress = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).expect("memory for zstd");
        let (packed, valid) = match self {
            Self::Plain => return Some((0, bytes.to_vec(), true)),
            Self::NoChecksum => return Some((NO_CHECKSUM, bytes.to_vec(), true)),
            Self::Compressed => (compress(bytes), true),
            Self::Frames => {
                let frames = bytes.chunks(PAGE / 2 + 1).map(compress);
                (frames.collect::<Vec<_>>().concat(), true)
            }
            Self::WrongLength(more) => {
                let length = bytes.len().saturating_add_signed(more.into());
                let mut other = bytes.to_vec();
                other.resize(length, 1);
                (compress(&other), more == 0)
            }
            Self::Garbage => (bytes[..bytes.len().min(600)].to_vec(), false),
        };
        // The format allows only payloads that are shorter than the pages.
        (packed.len() < bytes.len()).then_some((ZSTD, packed, valid))
    }
}

impl Fault {
    /// Damages streams that are encoded.
    fn damage(&self, streams: &mut Vec<Vec<u8>>) {
        let count = streams.len().max(1);
        let of = |channel: &u8| usize::from(*channel) % count;
        match self {
            Self::Flip(channel, at, change) => {
                if let Some(bytes) = streams.get_mut(of(channel)) {
                    let at = usize::from(*at) % bytes.len().max(1);
                    bytes
                        .iter_mut()
                        .skip(at)
                        .take(1)
                        .for_each(|it| *it ^= change);
                }
            }
            Self::Truncate(channel, at) => {
                if let Some(bytes) = streams.get_mut(of(channel)) {
                    bytes.truncate(usize::from(*at) % bytes.len().max(1));
                }
            }
            Self::Append(channel, more) => {
                if let Some(bytes) = streams.get_mut(of(channel)) {
                    bytes.extend(more.iter().take(PAGE));
                }
            }
            Self::Missing(channel) if !streams.is_empty() => {
                streams.remove(of(channel));
            }
            Self::Twice(channel) if !streams.is_empty() => {
                streams.push(streams[of(channel)].clone());
            }
            _ => {}
        }
    }
}

/// Receives a valid stream of one page into the destination of a failed one.
fn check_honest_stream(place: &Place, blocks: &[(String, u64)]) {
    for (name, _) in blocks {
        // The failed stream may have had RAM blocks of another size.
        let _ = fs::remove_file(place.path(name));
    }
    let blocks: Vec<_> = blocks.iter().map(|(name, _)| (name.clone(), 2)).collect();
    let header = Header {
        flags: 0,
        channels: 1,
        seed: 1,
        blocks: blocks.clone(),
    };
    let mut model = Model::new(&blocks);
    let mut channel = Channel::new(&header, 0, &[]);
    let bytes = content(7, 1);
    channel.record((PAGES, 0, 0), (1, 1), &bytes, &[]);
    model.write(0, 1, &bytes);
    let mut channels = [channel];
    finish(&mut channels, 0, Some(content_digest(1, &model.0)), &[]);
    let [channel] = channels;
    let destination = place.destination(&blocks, false);
    let (result, _) = place.receive(&[channel.bytes], Transport::File, destination);
    let received = result.expect("an honest stream is received");
    assert!(received.content_checked && !place.is_marked(&blocks));
    place.check_content(&blocks, &model.0);
}

/// Sends a stream with the real sender, and receives it.
fn honest(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let plan = Plan::arbitrary(input)?;
    let level = i8::arbitrary(input)?;
    let blocks = Plan { huge: None, ..plan }.blocks();
    let ram_blocks = blocks
        .iter()
        .map(|(name, pages)| RamBlock::new(name, pages * PAGE as u64).expect("a RAM block"));
    let layout = Layout::new(ram_blocks, []).expect("a layout");
    let place = Place::new();
    let sent = place.path("sent");
    let options = WriterOptions {
        compression: match level {
            0 => Compression::None,
            level => Compression::Zstd(i32::from(level % 4)),
        },
        seed: 3,
        ..WriterOptions::default()
    };
    let mut writer = Writer::start(Address::File(sent.clone()), &layout, options).expect("a file");
    let mut model = Model::new(&blocks);
    let (mut iterations, mut pages_sent, mut zeros_sent) = (0, 0, 0);
    for record in rest_of::<Record>(input, RECORDS) {
        match record {
            Record::Pages(block, first, pages, fill, _) => {
                let block = usize::from(block) % blocks.len();
                let (first, pages) = run_in(blocks[block].1, first, pages, SMALL);
                let bytes = content(fill, pages);
                let run = PageRun {
                    block,
                    first,
                    pages,
                };
                writer.pages(run, &bytes).expect("room in the file");
                model.write(block, first, &bytes);
                pages_sent += pages;
            }
            Record::Zeros(block, first, pages) => {
                let block = usize::from(block) % blocks.len();
                let (first, pages) = run_in(blocks[block].1, first, pages, SMALL);
                let run = PageRun {
                    block,
                    first,
                    pages,
                };
                writer.zeros(run).expect("room in the file");
                model.write(block, first, &content(0, pages));
                zeros_sent += pages;
            }
            Record::IterationEnd | Record::IterationEndOn(_) | Record::Any(..) => {
                writer.end_iteration().expect("room in the file");
                iterations += 1;
            }
        }
    }
    let digest = content_digest(3, &model.0);
    let receipt = writer.finish(Some(digest)).expect("room in the file");
    let bytes = fs::read(&sent).expect("the stream");
    assert_eq!(receipt.bytes, bytes.len() as u64);
    let destination = place.destination(&blocks, plan.only_file);
    let (result, _) = place.receive(&[bytes], Transport::File, destination);
    let received = result.expect("the sender's stream is received");
    let seen = (received.iterations, received.pages, received.zeros);
    assert_eq!(seen, (iterations, pages_sent, zeros_sent));
    assert!(received.content_checked && !place.is_marked(&blocks));
    place.check_content(&blocks, &model.0);
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Peers that refuse, die or stall, and cancellation.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use super::super::format::{
    payload_checksum, stream_digest, Answer, RecordHeader, RecordKind, StreamHeader,
};
use super::*;
use crate::CancelToken;

const PAGES: [u64; 2] = [5000, 3];
/// A limit far above the duration of any test.
const LONG: Duration = Duration::from_secs(600);

/// Plays the receiver: reads the headers of `channels` channels, and accepts the stream.
fn by_hand(listener: &UnixListener, channels: usize) -> Vec<UnixStream> {
    let mut streams: Vec<_> = (0..channels)
        .map(|_| listener.accept().unwrap().0)
        .collect();
    for stream in &mut streams {
        let mut start = [0; 16];
        stream.read_exact(&mut start).unwrap();
        let mut rest = vec![0; StreamHeader::length(&start).unwrap() - start.len()];
        stream.read_exact(&mut rest).unwrap();
    }
    for stream in &mut streams {
        stream.write_all(&Answer::Accepted.encode()).unwrap();
    }
    streams
}

fn write_until_it_fails(writer: &mut Writer) -> StreamError {
    let bytes = pattern(3, 256);
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < LONG, "it never fails");
        if let Err(error) = writer.pages(run(0, 0, 256), &bytes) {
            return error;
        }
    }
}

fn same(a: &StreamError, b: &StreamError) {
    assert_eq!(a.to_string(), b.to_string());
}

#[test]
fn a_refusal_comes_with_its_words_over_all_channels() {
    for kind in ["unix", "tcp"] {
        for channels in [1, 3] {
            let dir = TestDir::new();
            std::fs::write(dir.path("vga"), "too short").unwrap();
            let (address, receiving) = dir.receive(&dir.address(kind));
            let options = WriterOptions {
                channels,
                ..WriterOptions::default()
            };
            let error = Writer::start(address, &layout(PAGES), options).unwrap_err();
            let here = receiving.end().unwrap_err().to_string();
            assert!(here.contains("has 9 bytes"), "{here}");
            assert_eq!(
                error.to_string(),
                format!("receiver refused the stream: {here}")
            );
            assert!(dir.marked());
        }
    }
}

#[test]
fn what_the_receiver_finds_wrong_later_reaches_the_sender() {
    for kind in ["unix", "tcp"] {
        for channels in [1, 2] {
            let dir = TestDir::new();
            let (address, receiving) = dir.receive(&dir.address(kind));
            let options = WriterOptions {
                channels,
                ..WriterOptions::default()
            };
            let mut writer = Writer::start(address, &layout(PAGES), options).unwrap();
            writer.pages(run(0, 1, 1), &[1; PAGE]).unwrap();
            let error = writer.finish(Some(99)).unwrap_err();
            let here = receiving.end().unwrap_err();
            assert!(
                matches!(here, StreamError::ContentMismatch { there: 99, .. }),
                "{here}"
            );
            let StreamError::ReceiverFailed(words) = error else {
                panic!("{error}");
            };
            assert_eq!(words, here.to_string());
            assert!(dir.marked());
        }
    }
}

#[test]
fn a_receiver_that_gives_up_while_it_is_sent_to_is_heard() {
    for channels in [1, 3] {
        let dir = TestDir::new();
        let listener = UnixListener::bind(dir.path("stream")).unwrap();
        let receiver = std::thread::spawn(move || {
            let mut streams = by_hand(&listener, channels);
            let words = "no space left on device".to_owned();
            let last = streams.len() - 1;
            streams[last]
                .write_all(&Answer::Failed(words).encode())
                .unwrap();
            drop(streams);
        });
        let options = WriterOptions {
            channels: channels as u16,
            ..WriterOptions::default()
        };
        let address = dir.address("unix");
        let mut writer = Writer::start(address, &layout(PAGES), options).unwrap();
        receiver.join().unwrap();
        let error = write_until_it_fails(&mut writer);
        if channels == 1 {
            let expected = "receiver failed: no space left on device";
            assert_eq!(error.to_string(), expected);
        } else {
            let known = matches!(
                error,
                StreamError::ReceiverFailed(_) | StreamError::Closed { .. }
            );
            assert!(known, "{error}");
        }
        same(&writer.zeros(run(0, 0, 1)).unwrap_err(), &error);
        same(&writer.end_iteration().unwrap_err(), &error);
        same(&writer.finish(None).unwrap_err(), &error);
    }
}

#[test]
fn a_receiver_that_dies_is_noticed_at_once() {
    for channels in [1, 3] {
        let dir = TestDir::new();
        let listener = UnixListener::bind(dir.path("stream")).unwrap();
        let receiver = std::thread::spawn(move || drop(by_hand(&listener, channels)));
        let options = WriterOptions {
            channels: channels as u16,
            ..WriterOptions::default()
        };
        let address = dir.address("unix");
        let mut writer = Writer::start(address, &layout(PAGES), options).unwrap();
        receiver.join().unwrap();
        let error = write_until_it_fails(&mut writer);
        assert!(matches!(error, StreamError::Closed { .. }), "{error}");
        assert!(error.to_string().starts_with("channel "), "{error}");
    }
}

#[test]
fn a_receiver_that_dies_before_its_verdict_has_not_confirmed() {
    let dir = TestDir::new();
    let listener = UnixListener::bind(dir.path("stream")).unwrap();
    let receiver = std::thread::spawn(move || {
        let mut streams = by_hand(&listener, 1);
        // Reads a part of the final record.
        streams[0].read_exact(&mut [0; 60]).unwrap();
        streams[0].write_all(&Answer::Working.encode()).unwrap();
    });
    let writer = Writer::start(
        dir.address("unix"),
        &layout(PAGES),
        WriterOptions::default(),
    );
    let error = writer.unwrap().finish(None).unwrap_err();
    assert!(matches!(error, StreamError::Closed { .. }), "{error}");
    receiver.join().unwrap();
}

#[test]
fn an_answer_that_makes_no_sense_is_an_error() {
    for (bytes, words) in [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            "not an answer",
        ),
        (Answer::Complete.encode(), "kind 3"),
        (b"\x8dANS\x02\0\xff\xff".to_vec(), "65535 bytes"),
    ] {
        let dir = TestDir::new();
        let listener = UnixListener::bind(dir.path("stream")).unwrap();
        let receiver = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&bytes).unwrap();
            // Wait until the sender closes the connection.
            std::io::copy(&mut stream, &mut std::io::sink()).ok();
        });
        let address = dir.address("unix");
        let error = Writer::start(address, &layout(PAGES), WriterOptions::default()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        receiver.join().unwrap();
    }
}

#[test]
fn nobody_there_is_an_error_that_names_the_address() {
    let dir = TestDir::new();
    let start = |text: &str| {
        let address = text.parse::<Address>().unwrap();
        let error = Writer::start(address, &layout(PAGES), WriterOptions::default()).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        error.to_string()
    };
    start(&format!("unix:{}", dir.path("missing").display()));
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let error = start(&format!("tcp:127.0.0.1:{port}"));
    assert!(error.contains("refused"), "{error}");
    start("file:/nowhere/at/all");
    start("fd:1073741824");
    let options = WriterOptions {
        channels: 2,
        ..WriterOptions::default()
    };
    let address = dir.address("file");
    let error = Writer::start(address, &layout(PAGES), options).unwrap_err();
    assert!(error.to_string().contains("several channels"), "{error}");
    for channels in [0, 65] {
        let options = WriterOptions {
            channels,
            ..WriterOptions::default()
        };
        let error = Writer::start(dir.address("unix"), &layout(PAGES), options).unwrap_err();
        assert!(error.to_string().contains("1 to 64 channels"), "{error}");
    }
}

#[test]
fn a_sender_that_dies_leaves_the_destination_incomplete() {
    for kind in ["unix", "tcp"] {
        for channels in [1, 3] {
            let dir = TestDir::new();
            let (address, receiving) = dir.receive(&dir.address(kind));
            let options = WriterOptions {
                channels,
                ..WriterOptions::default()
            };
            let mut writer = Writer::start(address, &layout(PAGES), options).unwrap();
            writer.pages(run(0, 0, 1000), &pattern(1, 1000)).unwrap();
            writer.end_iteration().unwrap();
            drop(writer);
            let error = receiving.end().unwrap_err();
            let ended = matches!(
                error,
                StreamError::Closed { .. }
                    | StreamError::Malformed {
                        fault: Fault::MissingFinalRecord | Fault::TruncatedRecord,
                        ..
                    }
            );
            assert!(ended, "{error}");
            assert!(dir.marked());
        }
    }
}

#[test]
fn cancel_ends_a_writer_that_nobody_reads_from() {
    for channels in [1, 3] {
        let dir = TestDir::new();
        let listener = UnixListener::bind(dir.path("stream")).unwrap();
        let receiver = std::thread::spawn(move || by_hand(&listener, channels));
        let options = WriterOptions {
            channels: channels as u16,
            ..WriterOptions::default()
        };
        let address = dir.address("unix");
        let mut writer = Writer::start(address, &layout(PAGES), options).unwrap();
        let mut streams = receiver.join().unwrap();
        let cancel_token = writer.cancel_token();
        let memory = memory(&layout(PAGES));
        let writing = std::thread::spawn(move || {
            let uncopied = run(0, 0, PAGES[0]);
            let error = loop {
                if let Err(error) = writer.pages_from(uncopied, &memory) {
                    break error;
                }
            };
            (error, writer.end_iteration().unwrap_err())
        });
        // Wait until the writer has written to every channel. No thread reads, so the writer stalls soon.
        let full = |stream: &UnixStream| {
            let mut fds = [rustix::event::PollFd::new(
                stream,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, None).unwrap();
        };
        streams.iter().for_each(full);
        cancel_token.cancel();
        let (error, again) = writing.join().unwrap();
        assert!(matches!(error, StreamError::Cancelled), "{error}");
        assert!(matches!(again, StreamError::Cancelled), "{again}");
        // The receiver sees the end of the stream.
        for stream in &mut streams {
            std::io::copy(stream, &mut std::io::sink()).unwrap();
        }
    }
}

#[test]
fn cancel_ends_a_start_that_nobody_answers_and_a_wait_for_the_verdict() {
    let dir = TestDir::new();
    let listener = UnixListener::bind(dir.path("stream")).unwrap();
    let cancel = CancelToken::default();
    let options = WriterOptions {
        cancel: cancel.clone(),
        ..WriterOptions::default()
    };
    let address = dir.address("unix");
    let starting =
        std::thread::spawn(move || Writer::start(address, &layout(PAGES), options).map(drop));
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0; 16]).unwrap();
    cancel.cancel();
    let error = starting.join().unwrap().unwrap_err();
    assert!(matches!(error, StreamError::Cancelled), "{error}");

    let receiver = std::thread::spawn(move || by_hand(&listener, 1));
    let writer = Writer::start(
        dir.address("unix"),
        &layout(PAGES),
        WriterOptions::default(),
    );
    let writer = writer.unwrap();
    let mut streams = receiver.join().unwrap();
    let cancel_token = writer.cancel_token();
    let finishing = std::thread::spawn(move || writer.finish(None));
    streams[0].read_exact(&mut [0; 48 + 96]).unwrap();
    cancel_token.cancel();
    let error = finishing.join().unwrap().unwrap_err();
    assert!(matches!(error, StreamError::Cancelled), "{error}");
}

#[test]
fn a_writer_waits_for_the_reader_of_a_fifo_until_it_is_cancelled() {
    let dir = TestDir::new();
    let fifo = dir.path("stream");
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, mode, 0).unwrap();
    let cancel = CancelToken::default();
    let start = || {
        let options = WriterOptions {
            cancel: cancel.clone(),
            ..WriterOptions::default()
        };
        let address = dir.address("file");
        std::thread::spawn(move || Writer::start(address, &layout(PAGES), options))
    };
    let starting = start();
    let mut reader = std::fs::File::open(&fifo).unwrap();
    let writer = starting.join().unwrap().unwrap();
    drop(writer);
    reader.read_exact(&mut [0; 16]).unwrap();
    drop(reader);
    let starting = start();
    cancel.cancel();
    let error = starting.join().unwrap().map(drop).unwrap_err();
    assert!(matches!(error, StreamError::Cancelled), "{error}");
}

#[test]
fn cancel_ends_a_writer_into_a_full_pipe() {
    let (from, to) = rustix::pipe::pipe().unwrap();
    let target = Target::Connected(vec![to]);
    let mut writer = Writer::start(target, &layout(PAGES), WriterOptions::default()).unwrap();
    let cancel_token = writer.cancel_token();
    let writing = std::thread::spawn(move || write_until_it_fails(&mut writer));
    let mut fds = [rustix::event::PollFd::new(
        &from,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None).unwrap();
    cancel_token.cancel();
    assert!(matches!(writing.join().unwrap(), StreamError::Cancelled));
}

#[test]
fn cancel_ends_a_receiver_that_waits() {
    // The receiver waits: for a sender, for the rest of a header, for a record, for a record of the second iteration.
    for stage in 0..4 {
        let dir = TestDir::new();
        let cancel = CancelToken::default();
        let options = ReceiverOptions {
            cancel: cancel.clone(),
            ..ReceiverOptions::default()
        };
        let (address, receiving) = dir.receive_with(&dir.address("unix"), options);
        let Address::Unix(path) = &address else {
            panic!("{address}");
        };
        let mut kept = Vec::new();
        match stage {
            0 => {}
            1 => {
                let mut stream = UnixStream::connect(path).unwrap();
                stream.write_all(&[0x8d]).unwrap();
                kept.push(stream);
            }
            _ => {
                let options = WriterOptions {
                    channels: 2,
                    ..WriterOptions::default()
                };
                let mut writer = Writer::start(address, &layout(PAGES), options).unwrap();
                if stage == 3 {
                    writer.end_iteration().unwrap();
                    while receiving.progress.iterations() == 0 {
                        std::thread::yield_now();
                    }
                }
                cancel.cancel();
                let error = write_until_it_fails(&mut writer);
                assert!(!matches!(error, StreamError::Stalled { .. }), "{error}");
            }
        }
        cancel.cancel();
        let error = receiving.end().unwrap_err();
        assert!(matches!(error, StreamError::Cancelled), "{error}");
        assert!(dir.marked());
    }
}

#[test]
fn silence_has_limits_where_somebody_must_speak() {
    let short = Duration::from_millis(50);
    let timeout = || ReceiverOptions {
        accept_timeout: Some(short),
        timeout: short,
        ..ReceiverOptions::default()
    };
    // No sender connects.
    let dir = TestDir::new();
    let (_, receiving) = dir.receive_with(&dir.address("unix"), timeout());
    let error = receiving.end().unwrap_err();
    assert!(
        matches!(error, StreamError::MissingChannels { there: 0, .. }),
        "{error}"
    );

    // A sender connects and sends nothing.
    let dir = TestDir::new();
    let mut options = timeout();
    options.accept_timeout = None;
    let (address, receiving) = dir.receive_with(&dir.address("unix"), options.clone());
    let Address::Unix(path) = &address else {
        panic!("{address}");
    };
    let stream = UnixStream::connect(path).unwrap();
    let error = receiving.end().unwrap_err();
    assert!(matches!(error, StreamError::Stalled { .. }), "{error}");
    drop(stream);

    // The second of two channels does not connect. The first connects before the receiver accepts.
    let dir = TestDir::new();
    let listener = Listener::bind(&dir.address("unix")).unwrap();
    let receiver = Receiver::new(listener, dir.destination(), options.clone()).unwrap();
    let mut stream = UnixStream::connect(dir.path("stream")).unwrap();
    stream.write_all(&header(0, 2)).unwrap();
    let error = receiver.run().unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::MissingChannels {
                there: 1,
                wanted: 2,
                ..
            }
        ),
        "{error}"
    );

    // A receiver does not answer, or does not read.
    let dir = TestDir::new();
    let listener = UnixListener::bind(dir.path("stream")).unwrap();
    let sender = WriterOptions {
        timeout: short,
        ..WriterOptions::default()
    };
    let start = || Writer::start(dir.address("unix"), &layout(PAGES), sender.clone());
    let error = start().unwrap_err();
    assert!(matches!(error, StreamError::Stalled { .. }), "{error}");
    drop(listener.accept().unwrap());
    // The timeout also applies to the answer, which may be late on a busy host. So each retry doubles the timeout.
    let mut timeout = short;
    let (mut writer, kept) = loop {
        let hand = listener.try_clone().unwrap();
        let receiver = std::thread::spawn(move || by_hand(&hand, 1));
        let options = WriterOptions {
            timeout,
            ..WriterOptions::default()
        };
        match Writer::start(dir.address("unix"), &layout(PAGES), options) {
            Ok(writer) => break (writer, receiver.join().unwrap()),
            Err(StreamError::Stalled { .. }) if timeout < LONG => timeout *= 2,
            Err(error) => panic!("{error}"),
        }
        // Ignored: the receiver may have failed to answer the writer that timed out.
        drop(receiver.join());
    };
    let error = write_until_it_fails(&mut writer);
    assert!(matches!(error, StreamError::Stalled { .. }), "{error}");
    drop(kept);
}

/// Returns the encoded stream header of one of `channels` channels.
fn header(channel: u16, channels: u16) -> Vec<u8> {
    let blocks = NAMES.iter().zip(PAGES);
    let header = StreamHeader {
        answers: true,
        id: [1; 16],
        channel,
        channels,
        seed: 0,
        blocks: blocks
            .map(|(name, pages)| super::super::format::RamBlockEntry {
                name: (*name).into(),
                pages,
            })
            .collect(),
    };
    header.encode().unwrap().0
}

#[test]
fn channels_of_another_migration_and_the_same_twice_are_refused() {
    let mut other = header(1, 2);
    other[24] = 2;
    let end = other.len() - 8;
    let check = xxhash_rust::xxh3::xxh3_64(&other[..end]);
    other[end..].copy_from_slice(&check.to_le_bytes());
    for (second, words) in [
        (other, "channel belongs to another migration"),
        (header(0, 2), "channel 0 is already connected"),
        (header(1, 3), "channel belongs to another migration"),
    ] {
        let dir = TestDir::new();
        let (address, receiving) = dir.receive(&dir.address("unix"));
        let Address::Unix(path) = &address else {
            panic!("{address}");
        };
        let mut streams = Vec::new();
        for header in [header(0, 2), second] {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(&header).unwrap();
            streams.push(stream);
        }
        for stream in &mut streams {
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            let answer = Answer::decode(&answer).unwrap();
            let Answer::Refused(answer) = answer else {
                panic!("{answer:?}");
            };
            assert!(answer.contains(words), "{answer}");
        }
        drop(streams);
        assert!(receiving.end().unwrap_err().to_string().contains(words));
        assert!(dir.marked());
    }
}

#[test]
fn a_second_sender_is_refused_at_once() {
    let dir = TestDir::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let writer = Writer::start(address.clone(), &layout(PAGES), WriterOptions::default()).unwrap();
    let error = Writer::start(address, &layout(PAGES), WriterOptions::default()).unwrap_err();
    assert!(matches!(error, StreamError::Connect { .. }), "{error}");
    writer.finish(None).unwrap();
    receiving.end().unwrap();
}

#[test]
fn what_is_at_a_sockets_path_is_not_taken_from_the_living() {
    let dir = TestDir::new();
    let address = dir.address("unix");
    let first = Listener::bind(&address).unwrap();
    let error = Listener::bind(&address).unwrap_err().to_string();
    assert!(error.contains("in use by a running process"), "{error}");
    drop(first);
    assert!(!dir.path("stream").exists());
    // A killed process leaves such a socket file.
    drop(UnixListener::bind(dir.path("stream")).unwrap());
    Listener::bind(&address).unwrap();
    std::fs::write(dir.path("stream"), "precious").unwrap();
    let error = Listener::bind(&address).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
}

#[test]
fn progress_shows_what_has_been_received() {
    let dir = TestDir::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let progress = receiving.progress.clone();
    assert_eq!(progress.phase(), ReceivePhase::Waiting);
    let mut writer = Writer::start(address, &layout(PAGES), WriterOptions::default()).unwrap();
    writer.pages(run(0, 0, 300), &pattern(2, 300)).unwrap();
    writer.zeros(run(0, 300, 7)).unwrap();
    writer.end_iteration().unwrap();
    let start = Instant::now();
    while progress.iterations() == 0 {
        assert!(start.elapsed() < LONG, "the iteration never ends there");
        std::thread::yield_now();
    }
    assert_eq!(progress.phase(), ReceivePhase::Receiving);
    assert_eq!((progress.pages(), progress.zeros()), (300, 7));
    assert_eq!(progress.total(), 5003);
    let receipt = writer.finish(None).unwrap();
    let received = receiving.end().unwrap();
    assert_eq!(progress.phase(), ReceivePhase::Ended);
    assert_eq!(
        (received.bytes, progress.bytes()),
        (receipt.bytes, receipt.bytes)
    );
}

#[test]
fn a_sender_that_cannot_be_told_of_success_leaves_the_mark() {
    let dir = TestDir::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let Address::Unix(path) = &address else {
        panic!("{address}");
    };
    // A sender sends a whole stream and cannot receive the final answer.
    let mut stream = UnixStream::connect(path).unwrap();
    let bytes = header(0, 1);
    stream.write_all(&bytes).unwrap();
    stream.read_exact(&mut [0; 16]).unwrap();
    stream.shutdown(Shutdown::Read).unwrap();
    let mut chain = u64::from_le_bytes(bytes[bytes.len() - 8..].try_into().unwrap());
    let mut last = [0; 96];
    last[80..].copy_from_slice(&stream_digest([chain]).to_le_bytes());
    let head = RecordHeader {
        kind: RecordKind::Final,
        flags: 0,
        block: 0,
        length: 96,
        sequence: 0,
        first: 0,
        pages: 0,
        payload_checksum: payload_checksum(&last),
    };
    stream.write_all(&head.encode(&mut chain)).unwrap();
    stream.write_all(&last).unwrap();
    let error = receiving.end().unwrap_err();
    assert!(matches!(error, StreamError::Closed { .. }), "{error}");
    assert!(dir.marked());
}

#[test]
fn a_connection_that_is_open_elsewhere_ends_with_the_stream() {
    use std::os::fd::AsRawFd;
    let dir = TestDir::new();
    let (from, to) = UnixStream::pair().unwrap();
    let (_, receiving) = dir.receive(&Address::Fd(from.as_raw_fd()));
    let address = Address::Fd(to.as_raw_fd());
    let mut writer = Writer::start(address, &layout(PAGES), WriterOptions::default()).unwrap();
    writer.pages(run(0, 0, 1), &[1; PAGE]).unwrap();
    drop(writer);
    let error = receiving.end().unwrap_err();
    assert!(
        error.to_string().contains("without its final record"),
        "{error}"
    );
    drop((from, to));
}

#[test]
fn a_large_memory_is_compared_by_several_threads() {
    let dir = TestDir::new();
    // More than two chunks, mostly holes.
    let pages = [40_000, 3];
    let hasher = crate::digest::PageHasher::with_random_seed().unwrap();
    let mut digest = crate::digest::ContentDigest::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let options = WriterOptions {
        seed: hasher.seed(),
        ..WriterOptions::default()
    };
    let mut writer = Writer::start(address, &layout(pages), options).unwrap();
    for (block, page) in [(0, 0), (0, 16_383), (0, 16_384), (0, 39_999), (1, 2)] {
        let bytes = pattern(page + 3, 1);
        let bytes = if bytes[0] == 0 { vec![9; PAGE] } else { bytes };
        digest.add(block, page, hasher.hash(&bytes));
        writer.pages(run(block, page, 1), &bytes).unwrap();
    }
    writer.finish(Some(digest.value())).unwrap();
    assert!(receiving.end().unwrap().content_checked);
}

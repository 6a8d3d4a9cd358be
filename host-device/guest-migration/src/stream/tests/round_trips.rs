// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Round trips over every transport and with every option: the destination must equal the sent pages.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::digest::{ContentDigest, PageHasher};

const PAGES: [u64; 2] = [600, 30];

#[derive(Debug, Clone)]
enum Op {
    /// Pages from a buffer of the caller.
    Bytes(PageRun, u64),
    /// Pages from a memory file.
    File(PageRun, u64),
    Zeros(PageRun),
    IterationEnd,
}

fn runs() -> impl Strategy<Value = PageRun> {
    let longest = prop_oneof![3 => Just(4u64), 2 => Just(40), 1 => Just(600)];
    (0usize..2, 0u64..600, longest, any::<u64>()).prop_map(|(block, first, longest, pages)| {
        let first = first % PAGES[block];
        run(block, first, 1 + pages % longest.min(PAGES[block] - first))
    })
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (runs(), any::<u64>()).prop_map(|(run, seed)| Op::Bytes(run, seed >> 1)),
        4 => (runs(), any::<u64>()).prop_map(|(run, seed)| Op::File(run, seed >> 1)),
        2 => runs().prop_map(Op::Zeros),
        2 => Just(Op::IterationEnd),
    ];
    prop::collection::vec(op, 0..25)
}

fn options() -> impl Strategy<Value = WriterOptions> {
    let compression = prop_oneof![
        2 => Just(Compression::None),
        1 => Just(Compression::Zstd(1)),
        1 => Just(Compression::Zstd(-3)),
    ];
    (1u16..=4, compression).prop_map(|(channels, compression)| WriterOptions {
        channels,
        compression,
        ..WriterOptions::default()
    })
}

/// Guest memory as plain bytes.
struct Model(Vec<Vec<u8>>);

impl Model {
    fn new() -> Self {
        Self(PAGES.map(|pages| vec![0; pages as usize * PAGE]).to_vec())
    }

    fn write(&mut self, run: PageRun, bytes: &[u8]) {
        let at = run.first as usize * PAGE;
        self.0[run.block][at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn digest(&self, hasher: &PageHasher) -> u128 {
        let mut digest = ContentDigest::new();
        for (block, bytes) in self.0.iter().enumerate() {
            for (page, bytes) in (0..).zip(bytes.chunks(PAGE)) {
                digest.add(block, page, hasher.hash(bytes));
            }
        }
        digest.value()
    }

    fn check(&self, dir: &TestDir) {
        for (block, expected) in self.0.iter().enumerate() {
            let (bytes, data) = dir.content(block);
            assert!(
                bytes == *expected,
                "RAM block {block} differs from the source"
            );
            for (page, bytes) in expected.chunks(PAGE).enumerate() {
                let zero = bytes.iter().all(|byte| *byte == 0);
                assert!(!(zero && data[page]), "page {page} of zeros is no hole");
            }
        }
    }
}

/// Sends `ops`, and applies them to a model.
///
/// Each memory file stays unchanged until the stream ends, because it may be sent without a copy.
fn send(mut writer: Writer, ops: &[Op], content: Option<&PageHasher>) -> (Model, Receipt) {
    let layout = layout(PAGES);
    let mut model = Model::new();
    let mut files = Vec::new();
    let (mut pages, mut zeros, mut iterations) = (0, 0, 0);
    for op in ops {
        match op {
            Op::Bytes(run, seed) => {
                let bytes = pattern(*seed, run.pages);
                writer.pages(*run, &bytes).unwrap();
                model.write(*run, &bytes);
                pages += run.pages;
            }
            Op::File(run, seed) => {
                let memory = memory(&layout);
                let bytes = pattern(*seed, run.pages);
                let file = memory.file(run.block).unwrap();
                file.write_all_at(&bytes, run.offset()).unwrap();
                writer.pages_from(*run, &memory).unwrap();
                model.write(*run, &bytes);
                files.push(memory);
                pages += run.pages;
            }
            Op::Zeros(run) => {
                writer.zeros(*run).unwrap();
                model.write(*run, &vec![0; run.length() as usize]);
                zeros += run.pages;
            }
            Op::IterationEnd => {
                writer.end_iteration().unwrap();
                iterations += 1;
            }
        }
    }
    let digest = content.map(|hasher| model.digest(hasher));
    let receipt = writer.finish(digest).unwrap();
    assert_eq!(
        (receipt.pages, receipt.zeros, receipt.iterations),
        (pages, zeros, iterations)
    );
    (model, receipt)
}

fn compare(received: &Received, receipt: &Receipt, options: &WriterOptions, checked: bool) {
    assert_eq!(received.bytes, receipt.bytes);
    assert_eq!(received.pages, receipt.pages);
    assert_eq!(received.zeros, receipt.zeros);
    assert_eq!(received.iterations, receipt.iterations);
    assert_eq!(received.channels, options.channels);
    assert_eq!(received.content_checked, checked);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn two_way(
        kind in prop_oneof![Just("unix"), Just("tcp")],
        ops in ops(),
        options in options(),
        checked in any::<bool>(),
        exists in any::<bool>(),
    ) {
        let dir = TestDir::new();
        if exists {
            // A waiting VMM leaves files of the right size, with some content.
            for (name, pages) in NAMES.iter().zip(PAGES) {
                std::fs::write(dir.path(name), pattern(9, pages)).unwrap();
            }
        }
        let (address, receiving) = dir.receive(&dir.address(kind));
        let hasher = PageHasher::with_random_seed().unwrap();
        let options = WriterOptions { seed: hasher.seed(), ..options };
        let writer = Writer::start(address, &layout(PAGES), options.clone()).unwrap();
        let (model, receipt) = send(writer, &ops, checked.then_some(&hasher));
        prop_assert!(receipt.confirmed);
        prop_assert!(!dir.marked());
        let received = receiving.end().unwrap();
        compare(&received, &receipt, &options, checked);
        model.check(&dir);
    }

    #[test]
    fn file(ops in ops(), options in options(), checked in any::<bool>()) {
        let dir = TestDir::new();
        let address = dir.address("file");
        let hasher = PageHasher::with_random_seed().unwrap();
        let options = WriterOptions { channels: 1, seed: hasher.seed(), ..options };
        let writer = Writer::start(address.clone(), &layout(PAGES), options.clone()).unwrap();
        let (model, receipt) = send(writer, &ops, checked.then_some(&hasher));
        prop_assert!(!receipt.confirmed);
        prop_assert_eq!(std::fs::metadata(dir.path("stream")).unwrap().len(), receipt.bytes);
        let (_, receiving) = dir.receive(&address);
        let received = receiving.end().unwrap();
        compare(&received, &receipt, &options, checked);
        prop_assert!(!dir.marked());
        model.check(&dir);
    }

    #[test]
    fn descriptors(ops in ops(), pipe in any::<bool>(), options in options()) {
        let dir = TestDir::new();
        let (from, to): (OwnedFd, OwnedFd) = if pipe {
            rustix::pipe::pipe().unwrap()
        } else {
            let (a, b) = UnixStream::pair().unwrap();
            (a.into(), b.into())
        };
        let (_, receiving) = dir.receive(&Address::Fd(from.as_raw_fd()));
        drop(from);
        let options = WriterOptions { channels: 1, ..options };
        let address = Address::Fd(to.as_raw_fd());
        let writer = Writer::start(address, &layout(PAGES), options.clone()).unwrap();
        let (model, receipt) = send(writer, &ops, None);
        prop_assert_eq!(receipt.confirmed, !pipe);
        let received = receiving.end().unwrap();
        compare(&received, &receipt, &options, false);
        model.check(&dir);
    }
}

#[test]
fn one_file_takes_a_stream_of_one_block_and_a_listening_descriptor_will_do() {
    let dir = TestDir::new();
    let socket = std::os::unix::net::UnixListener::bind(dir.path("stream")).unwrap();
    let address = Address::Fd(socket.as_raw_fd());
    let path = dir.path("memory");
    let receiving = std::thread::spawn({
        let destination = Destination::with_file(&path);
        move || receive(&address, destination)
    });
    let layout = Layout::new([RamBlock::new("any name", 2 * PAGE_SIZE).unwrap()], []).unwrap();
    let mut writer = Writer::start(dir.address("unix"), &layout, WriterOptions::default()).unwrap();
    writer.pages(run(0, 1, 1), &[3; PAGE]).unwrap();
    writer.finish(None).unwrap();
    let received = receiving.join().unwrap().unwrap();
    assert_eq!(received.blocks, [("any name".into(), 2, path.clone())]);
    let (bytes, data) = read(&path);
    assert!(bytes[..PAGE].iter().all(|byte| *byte == 0));
    assert!(bytes[PAGE..].iter().all(|byte| *byte == 3));
    assert_eq!(data, [false, true]);
}

#[test]
fn channels_that_are_connected_already() {
    let dir = TestDir::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let Address::Unix(path) = &address else {
        panic!("{address}");
    };
    let fds = (0..3).map(|_| OwnedFd::from(UnixStream::connect(path).unwrap()));
    let target = Target::Connected(fds.collect());
    let mut writer = Writer::start(target, &layout(PAGES), WriterOptions::default()).unwrap();
    let bytes = pattern(3, 600);
    writer.pages(run(0, 0, 600), &bytes).unwrap();
    assert!(writer.finish(None).unwrap().confirmed);
    assert_eq!(receiving.end().unwrap().channels, 3);
    assert!(dir.content(0).0 == bytes);
}

#[test]
fn sending_a_file_allocates_none_of_its_holes() {
    use std::os::unix::fs::MetadataExt;
    let dir = TestDir::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let memory = memory(&layout(PAGES));
    let file = memory.file(0).unwrap();
    file.write_all_at(&[1; PAGE], 300 * PAGE_SIZE).unwrap();
    let mut writer = Writer::start(address, memory.layout(), WriterOptions::default()).unwrap();
    writer.pages_from(run(0, 0, 600), &memory).unwrap();
    writer.pages_from(run(1, 3, 2), &memory).unwrap();
    writer.finish(None).unwrap();
    receiving.end().unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE_SIZE);
    assert_eq!(memory.file(1).unwrap().metadata().unwrap().blocks(), 0);
    let (_, data) = dir.content(0);
    assert_eq!(data.iter().position(|it| *it), Some(300));
    assert_eq!(data.iter().filter(|it| **it).count(), 1);
}

#[test]
fn what_is_small_is_gathered_and_what_packs_is_packed() {
    let dir = TestDir::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let options = WriterOptions {
        compression: Compression::Zstd(1),
        ..WriterOptions::default()
    };
    let mut writer = Writer::start(address, &layout(PAGES), options).unwrap();
    let header = writer.bytes();
    for page in 0..20 {
        writer
            .pages(run(1, page, 1), &[page as u8 + 1; PAGE])
            .unwrap();
    }
    assert_eq!(writer.bytes(), header, "nothing is written page by page");
    writer.flush().unwrap();
    let packed = writer.bytes() - header;
    assert!(packed > 20 * 48 && packed < 20 * 200, "{packed}");
    writer.finish(None).unwrap();
    receiving.end().unwrap();
}

#[test]
fn pages_that_are_not_of_the_layout_are_refused_and_the_stream_goes_on() {
    let dir = TestDir::new();
    let (address, receiving) = dir.receive(&dir.address("unix"));
    let mut writer = Writer::start(address, &layout(PAGES), WriterOptions::default()).unwrap();
    for bad in [
        run(2, 0, 1),
        run(0, 600, 1),
        run(0, 0, 0),
        run(0, 599, 2),
        run(1, u64::MAX, 2),
    ] {
        assert!(matches!(
            writer.zeros(bad),
            Err(StreamError::InvalidRun { .. })
        ));
    }
    assert!(matches!(
        writer.pages(run(0, 0, 1), &[0; 4095]),
        Err(StreamError::InvalidRun { .. })
    ));
    writer.zeros(run(0, 599, 1)).unwrap();
    writer.finish(None).unwrap();
    assert_eq!(receiving.end().unwrap().zeros, 1);
}

#[test]
fn where_the_system_cannot_send_without_a_copy_pages_are_copied() {
    let dir = TestDir::new();
    // The kernel refuses `sendfile` to a file that is open for appending.
    let file = File::options()
        .append(true)
        .create(true)
        .open(dir.path("stream"))
        .unwrap();
    let target = Target::Connected(vec![file.into()]);
    let memory = memory(&layout(PAGES));
    let bytes = pattern(8, 600);
    memory.file(0).unwrap().write_all_at(&bytes, 0).unwrap();
    let mut writer = Writer::start(target, memory.layout(), WriterOptions::default()).unwrap();
    writer.pages_from(run(0, 0, 600), &memory).unwrap();
    writer.finish(None).unwrap();
    let (_, receiving) = dir.receive(&dir.address("file"));
    assert_eq!(receiving.end().unwrap().pages, 600);
    assert!(dir.content(0).0 == bytes);
}

#[test]
fn memory_that_cannot_be_read_ends_the_stream_and_is_named() {
    for (pages, channels) in [(2, 1), (40, 1), (40, 2)] {
        let dir = TestDir::new();
        let (address, receiving) = dir.receive(&dir.address("unix"));
        let memory = memory(&layout(PAGES));
        let options = WriterOptions {
            channels,
            ..WriterOptions::default()
        };
        let mut writer = Writer::start(address, memory.layout(), options).unwrap();
        ftruncate(memory.file(0).unwrap(), 301 * PAGE_SIZE).unwrap();
        let sent = writer.pages_from(run(0, 300, pages), &memory);
        let error = sent.and_then(|()| writer.end_iteration()).unwrap_err();
        let words =
            format!("guest memory cannot be read: {pages} pages from page 300 of RAM block 0");
        assert!(error.to_string().starts_with(&words), "{error}");
        assert_eq!(
            writer.zeros(run(0, 0, 1)).unwrap_err().to_string(),
            error.to_string()
        );
        drop(writer);
        receiving.end().unwrap_err();
        assert!(dir.marked());
    }
}

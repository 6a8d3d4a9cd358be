// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Benchmark of a stream, compared with a plain copy of the same bytes over the same kind of socket.
//!
//! `cargo bench -p guest-migration --bench stream [-- MEBIBYTES]` measures all ways in turns, and prints two tables for
//! each kind of socket:
//!
//! - a reader discards the bytes, so the table measures the sender;
//! - the real receiver writes into a file, next to a plain reader that writes into a file of the same kind.
//!
//! The benchmark fails if a stream over a Unix socket, with one channel and without compression, reaches less than 60 %
//! of the speed of the plain copy.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest_migration::stream::{
    Compression, Destination, Listener, Receiver, ReceiverOptions, Target, Writer, WriterOptions,
};
use guest_migration::{Layout, Memory, PageRun, RamBlock, PAGE_SIZE};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use xxhash_rust::xxh3::xxh3_64;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const MEBIBYTE: usize = 1 << 20;
/// How often each way is measured, in turns.
///
/// The tables show medians: of the speeds, and of the ratios to the plain copy in the same turn.
const REPETITIONS: usize = 9;
/// The minimum speed of a stream over a Unix socket, in percent of the plain copy.
const ENOUGH: f64 = 60.0;

fn main() -> Result<()> {
    let mebibytes = std::env::args().filter_map(|it| it.parse().ok()).next();
    let bench = Bench::new(mebibytes.unwrap_or(512))?;
    println!(
        "{} MiB of random bytes, median of {REPETITIONS} turns; files in {}",
        bench.bytes.len() / MEBIBYTE,
        bench.directory.path().display()
    );
    for (name, pair) in [("Unix socket", unix as Pair), ("TCP", tcp as Pair)] {
        let sender = bench.table(
            &format!("{name}, a reader that only takes the bytes in"),
            &[
                ("plain copy", &|| bench.plain(pair, false, false)),
                ("Writer::pages", &|| bench.sender(pair, false)),
                ("Writer::pages_from", &|| bench.sender(pair, true)),
                ("plain copy out of the memory file", &|| {
                    bench.plain(pair, false, true)
                }),
            ],
        )?;
        let whole = bench.table(
            &format!("{name}, into a file"),
            &[
                ("plain copy", &|| bench.plain(pair, true, false)),
                ("Writer::pages, Receiver", &|| {
                    bench.whole(pair, 1, Compression::None, false)
                }),
                ("Writer::pages_from, Receiver", &|| {
                    bench.whole(pair, 1, Compression::None, true)
                }),
                ("... over 2 channels", &|| {
                    bench.whole(pair, 2, Compression::None, true)
                }),
                ("... with zstd", &|| {
                    bench.whole(pair, 1, Compression::Zstd(1), true)
                }),
            ],
        )?;
        let slowest = sender.min(whole);
        if name == "Unix socket" && slowest < ENOUGH {
            return Err(format!("only {slowest:.0} % of the plain copy").into());
        }
    }
    Ok(())
}

type Pair = fn() -> Result<(OwnedFd, OwnedFd)>;

fn unix() -> Result<(OwnedFd, OwnedFd)> {
    let (a, b) = UnixStream::pair()?;
    Ok((a.into(), b.into()))
}

fn tcp() -> Result<(OwnedFd, OwnedFd)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let a = TcpStream::connect(listener.local_addr()?)?;
    let (b, _) = listener.accept()?;
    a.set_nodelay(true)?;
    Ok((a.into(), b.into()))
}

struct Bench {
    memory: Memory,
    bytes: Vec<u8>,
    run: PageRun,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new(mebibytes: usize) -> Result<Self> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let bytes: Vec<u8> = (0..mebibytes * MEBIBYTE / 8)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })
            .collect();
        let length = bytes.len() as u64;
        let layout = Layout::new([RamBlock::new("ram", length)?], [])?;
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, length)?;
        file.write_all_at(&bytes, 0)?;
        // Guest memory usually is in a tmpfs.
        let shared = Path::new("/dev/shm");
        let directory = match shared.is_dir() {
            true => tempfile::tempdir_in(shared)?,
            false => tempfile::tempdir()?,
        };
        Ok(Self {
            memory: Memory::new(layout.into(), vec![file])?,
            bytes,
            run: PageRun {
                block: 0,
                first: 0,
                pages: length / PAGE_SIZE,
            },
            directory,
        })
    }

    /// Prints a table. Returns the speed of the slower of the second and third way, in percent of the first way.
    fn table(&self, title: &str, ways: &[(&str, &dyn Fn() -> Result<Duration>)]) -> Result<f64> {
        println!("\n{title}\n");
        let mut times: Vec<Vec<Duration>> = vec![Vec::new(); ways.len()];
        for _ in 0..REPETITIONS {
            for (times, (_, way)) in times.iter_mut().zip(ways) {
                times.push(way()?);
            }
        }
        println!("| way | MiB/s | of the plain copy | fastest |");
        println!("|---|---|---|---|");
        let median = |mut numbers: Vec<f64>| {
            numbers.sort_by(f64::total_cmp);
            numbers[REPETITIONS / 2]
        };
        let size = (self.bytes.len() / MEBIBYTE) as f64;
        let mut parts = Vec::new();
        for (way, (name, _)) in times.iter().zip(ways) {
            let speed: Vec<f64> = way.iter().map(|time| size / time.as_secs_f64()).collect();
            // Compare within a turn, because the load of the machine may change between turns.
            let pairs = times[0].iter().zip(way);
            let part = pairs.map(|(plain, way)| 100.0 * plain.as_secs_f64() / way.as_secs_f64());
            let part = median(part.collect());
            let fastest = speed.iter().copied().fold(0.0, f64::max);
            println!(
                "| {name} | {:.0} | {part:.0} % | {fastest:.0} |",
                median(speed)
            );
            parts.push(part);
        }
        Ok(parts[1].min(parts[2]))
    }

    /// Measures a plain copy, from the start of sending until the reader has all bytes.
    fn plain(&self, pair: Pair, into_file: bool, out_of_file: bool) -> Result<Duration> {
        let (to, from) = pair()?;
        let (mut to, mut from) = (File::from(to), File::from(from));
        let path = self.directory.path().join("plain");
        let file = into_file.then(|| File::create(&path)).transpose()?;
        let length = self.bytes.len();
        let start = Instant::now();
        thread::scope(|scope| -> Result<()> {
            let reader = scope.spawn(move || -> Result<()> {
                let mut buffer = vec![0; MEBIBYTE];
                let mut at = 0;
                while at < length {
                    let count = from.read(&mut buffer)?;
                    if count == 0 {
                        return Err("the sender went away".into());
                    }
                    if let Some(file) = &file {
                        file.write_all_at(&buffer[..count], at as u64)?;
                    }
                    at += count;
                }
                Ok(())
            });
            let memory = self.memory.file(0).filter(|_| out_of_file);
            let mut buffer = vec![0; MEBIBYTE];
            for (index, part) in self.bytes.chunks(MEBIBYTE).enumerate() {
                if let Some(memory) = memory {
                    memory.read_exact_at(&mut buffer, (index * MEBIBYTE) as u64)?;
                    to.write_all(&buffer)?;
                } else {
                    to.write_all(part)?;
                }
            }
            reader.join().map_err(|_| "the reader panicked")?
        })?;
        let time = start.elapsed();
        if into_file {
            std::fs::remove_file(path)?;
        }
        Ok(time)
    }

    fn send(&self, to: Vec<OwnedFd>, compression: Compression, uncopied: bool) -> Result<u64> {
        let options = WriterOptions {
            compression,
            ..WriterOptions::default()
        };
        let mut writer = Writer::start(Target::Connected(to), self.memory.layout(), options)?;
        if uncopied {
            writer.pages_from(self.run, &self.memory)?;
        } else {
            writer.pages(self.run, &self.bytes)?;
        }
        Ok(writer.finish(None)?.bytes)
    }

    fn sender(&self, pair: Pair, uncopied: bool) -> Result<Duration> {
        let (to, from) = pair()?;
        let mut from = File::from(from);
        // Bytes of the stream header, the pages, all record headers, and the final record; see docs/stream.md.
        let records = self
            .run
            .pages
            .div_ceil(guest_migration::stream::RECORD_PAGES);
        let wanted = (64 + 10 + 3 + 8) + self.bytes.len() as u64 + 48 * records + 48 + 96;
        let start = Instant::now();
        thread::scope(|scope| -> Result<()> {
            let reader = scope.spawn(move || -> Result<()> {
                from.write_all(&answer(1))?;
                let mut buffer = vec![0; MEBIBYTE];
                let mut seen = 0;
                while seen < wanted {
                    let count = from.read(&mut buffer)?;
                    if count == 0 {
                        return Err("the sender went away".into());
                    }
                    seen += count as u64;
                }
                from.write_all(&answer(3))?;
                Ok(())
            });
            let sent = self.send(vec![to], Compression::None, uncopied)?;
            assert_eq!(sent, wanted);
            reader.join().map_err(|_| "the reader panicked")?
        })?;
        Ok(start.elapsed())
    }

    fn whole(
        &self,
        pair: Pair,
        channels: usize,
        compression: Compression,
        uncopied: bool,
    ) -> Result<Duration> {
        let path = self.directory.path().join("memory");
        let destination = Destination::with_file(&path);
        let start = Instant::now();
        if channels > 1 {
            // Several channels need a listening socket of the same kind.
            let address = match std::ptr::fn_addr_eq(pair, unix as Pair) {
                true => format!("unix:{}", self.directory.path().join("socket").display()),
                false => "tcp:127.0.0.1:0".to_owned(),
            };
            let listener = Listener::bind(&address.parse()?)?;
            let address = listener.address().clone();
            let receiver = Receiver::new(listener, destination, ReceiverOptions::default())?;
            let thread = thread::spawn(move || receiver.run());
            let options = WriterOptions {
                channels: u16::try_from(channels)?,
                compression,
                ..WriterOptions::default()
            };
            let mut writer = Writer::start(address, self.memory.layout(), options)?;
            writer.pages_from(self.run, &self.memory)?;
            writer.finish(None)?;
            thread.join().map_err(|_| "the receiver panicked")??;
        } else {
            let (to, from) = pair()?;
            let listener = Listener::from_fd(from);
            let receiver = Receiver::new(listener, destination, ReceiverOptions::default())?;
            let thread = thread::spawn(move || receiver.run());
            self.send(vec![to], compression, uncopied)?;
            thread.join().map_err(|_| "the receiver panicked")??;
        }
        let time = start.elapsed();
        std::fs::remove_file(path)?;
        Ok(time)
    }
}

/// Returns an encoded answer of a receiver without a message; see docs/stream.md.
fn answer(kind: u8) -> Vec<u8> {
    let mut bytes = b"\x8dANS".to_vec();
    bytes.extend([kind, 0, 0, 0]);
    bytes.extend(xxh3_64(&bytes).to_le_bytes());
    bytes
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fuzz targets: everything that the host's programs read from a peer that they do not trust.
//!
//! Each target is a function of bytes. libFuzzer calls it through a program in `fuzz_targets/`, and `tests/replay.rs`
//! calls it with every file of `corpus/` and `regressions/`. A target panics if its input violates what the target
//! checks: see the module of each. All targets check that memory stays bounded and that no file descriptor leaks.

mod config;
mod guest;
mod limits;
mod qmp;
mod queues;
mod saved_state;
mod stream;
mod stream_encoder;
mod sys;
mod vhost_user;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

use limits::Limits;

/// A fuzz target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Descriptor chains and rings in guest memory.
    Queues,
    /// Messages of a front end, with file descriptors.
    VhostUser,
    /// The byte stream of a QMP client.
    Qmp,
    /// Accesses to configuration space.
    Config,
    /// Files of saved state.
    SavedState,
    /// Migration streams.
    Stream,
}

impl Target {
    /// All targets.
    pub const ALL: [Self; 6] = [
        Self::Queues,
        Self::VhostUser,
        Self::Qmp,
        Self::Config,
        Self::SavedState,
        Self::Stream,
    ];

    /// Returns the name of the target's program and of its folders.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queues => "queues",
            Self::VhostUser => "vhost_user",
            Self::Qmp => "qmp",
            Self::Config => "config",
            Self::SavedState => "saved_state",
            Self::Stream => "stream",
        }
    }

    /// Runs the target with one input.
    ///
    /// Inputs run one at a time: memory and descriptors are counted for the whole process.
    ///
    /// # Panics
    ///
    /// If the input violates what the target checks.
    pub fn run(self, bytes: &[u8]) {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        prepare();
        let panics = PANICS.load(Ordering::Relaxed);
        let limits = Limits::start();
        match self {
            Self::Queues => queues::run(bytes),
            Self::VhostUser => vhost_user::run(bytes),
            Self::Qmp => qmp::run(bytes),
            Self::Config => config::run(bytes),
            Self::SavedState => saved_state::run(bytes),
            Self::Stream => stream::run(bytes),
        }
        limits.check();
        // The daemon handles a panic in most of its threads.
        assert_eq!(PANICS.load(Ordering::Relaxed), panics, "a thread panicked");
    }
}

/// The number of panics, of all threads.
static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Formats all log messages, and discards them. Counts panics. Handles SIGPIPE, as each program with a `main` in Rust
/// does: that of libFuzzer is not.
fn prepare() {
    static PREPARED: Once = Once::new();
    PREPARED.call_once(|| {
        tracing_subscriber::fmt()
            .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
            .with_writer(std::io::sink)
            .init();
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::default())
            .expect("a handler of SIGPIPE");
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            hook(info);
        }));
    });
}

/// Runs `target` with each file that is named as an argument of the program.
pub fn replay_arguments(target: Target) -> ExitCode {
    for path in std::env::args_os().skip(1).map(PathBuf::from) {
        match std::fs::read(&path) {
            Ok(bytes) => target.run(&bytes),
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                return ExitCode::FAILURE;
            }
        }
        println!("{}: {}: ok", target.name(), path.display());
    }
    ExitCode::SUCCESS
}

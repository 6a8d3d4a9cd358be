// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A matrix of machines: each row of [`table::rows`] is one way in which a machine differs, each cell a driver and a device
//! on it, and what is done in each cell is the same ([`Guest::exercise_fully`]) but where the difference is something that
//! happens on the way ([`scenarios`]).
//!
//! [`Guest::exercise_fully`]: crate::guest::Guest::exercise_whole

pub mod scenarios;
pub mod table;

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};

use crate::artifacts::Artifacts;
use crate::guest::{Device, Driver};
use crate::vmm::hardware::Hardware;
use crate::vmm::Vmm;
use crate::MIB;
use scenarios::Scenario;

/// The environment variable that names the cells to be run: [`ALL`], or a text that their names hold. Unset, the usual ones.
pub const CELLS_VARIABLE: &str = "VIRTIO_BALLOON_RS_MATRIX";
/// The environment variable that names the file which results are written to.
pub const RESULTS_VARIABLE: &str = "VIRTIO_BALLOON_RS_MATRIX_RESULTS";
/// Every cell.
pub const ALL: &str = "all";

/// How many cells are run at once beside other tests, and for each two processors where there are no others.
const AT_ONCE: usize = 2;
const ALONE_AT_ONCE: usize = 3;

/// A driver and a device: a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pair {
    /// Our driver and our device.
    Ours,
    /// The kernel's own driver and our device.
    C,
    /// Our driver and QEMU's own device.
    OursInQemu,
    /// The kernel's own driver and QEMU's own device.
    CInQemu,
}

impl Pair {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ours, Self::C, Self::OursInQemu, Self::CInQemu];

    /// The driver.
    #[must_use]
    pub fn driver(self) -> Driver {
        match self {
            Self::Ours | Self::OursInQemu => Driver::Ours,
            Self::C | Self::CInQemu => Driver::C,
        }
    }

    /// The device.
    #[must_use]
    pub fn device(self) -> Device {
        match self {
            Self::Ours | Self::C => Device::Ours,
            Self::OursInQemu | Self::CInQemu => Device::QemuOwn,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "our driver, our device",
            Self::C => "C driver, our device",
            Self::OursInQemu => "our driver, QEMU's device",
            Self::CInQemu => "C driver, QEMU's device",
        }
    }
}

/// What is known beforehand of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It works.
    Works,
    /// It cannot be run, for this reason.
    CannotRun(&'static str),
}

/// A cell of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The driver and the device.
    pub pair: Pair,
    /// Whether it is one of the usual ones, which `make test` runs.
    pub is_default: bool,
    /// What is known of it.
    pub expected: Expected,
}

/// One way in which a machine differs from the usual one of these tests, which has 512 MiB of memory.
#[derive(Clone, Debug)]
pub struct Row {
    /// What differs.
    pub name: &'static str,
    /// The series of the kernel, if it is not the stock one.
    pub series: Option<&'static str>,
    /// Bytes of memory.
    pub memory: u64,
    /// What runs it.
    pub vmm: Vmm,
    /// More words for the kernel's command line.
    pub arguments: &'static str,
    /// The machine.
    pub hardware: Hardware,
    /// More properties of the balloon device, whichever it is.
    pub properties: &'static [&'static str],
    /// What our device offers.
    pub features: &'static [&'static str],
    /// What is done.
    pub scenario: Scenario,
    /// Its cells.
    pub entries: Vec<Entry>,
}

/// One cell.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Its row.
    pub row: Row,
    /// Its part of the row.
    pub entry: Entry,
}

impl Cell {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}: {}", self.row.name, self.entry.pair.name())
    }
}

/// How a cell ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// All is as it should be.
    Passed,
    /// Something is not.
    Failed(String),
    /// It was not run, for this reason.
    NotRun(String),
}

/// A cell that is done with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CellResult {
    /// The name of its row.
    pub row: String,
    /// Its column.
    pub pair: Pair,
    /// How it ended.
    pub verdict: Verdict,
    /// How long it took.
    pub seconds: u64,
}

/// Why a cell cannot be run on this host: an error that is none.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HostUnsupported(pub String);

/// The cells that `which` names, as [`CELLS_VARIABLE`] does.
///
/// # Errors
///
/// If there is none.
pub fn cells(which: Option<&str>) -> Result<Vec<Cell>> {
    let all = table::rows().into_iter().flat_map(|row| {
        let entries = row.entries.clone();
        entries.into_iter().map(move |entry| Cell {
            row: row.clone(),
            entry,
        })
    });
    let chosen: Vec<Cell> = all
        .filter(|cell| match which {
            None => cell.entry.is_default,
            Some(ALL) => true,
            Some(text) => cell.name().contains(text),
        })
        .collect();
    ensure!(
        !chosen.is_empty(),
        "no cell of the matrix has {:?} in its name",
        which.unwrap_or_default()
    );
    Ok(chosen)
}

/// Runs the cells that [`CELLS_VARIABLE`] names, and returns how each ended. Writes that to the file that
/// [`RESULTS_VARIABLE`] names, if it is set, as they end.
///
/// # Errors
///
/// If there are no such cells, or the results cannot be written.
pub fn run(artifacts: &Artifacts) -> Result<Vec<CellResult>> {
    let which = std::env::var(CELLS_VARIABLE).ok();
    let results = std::env::var_os(RESULTS_VARIABLE).map(PathBuf::from);
    let cells = cells(which.as_deref())?;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let at_once = match which {
        None => AT_ONCE,
        Some(_) => (processors * ALONE_AT_ONCE / 2).max(AT_ONCE),
    };
    let (waiting, outcomes) = (Mutex::new(cells.into_iter()), Mutex::new(Vec::new()));
    let work = || -> Result<()> {
        loop {
            let next = waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .next();
            let Some(cell) = next else {
                return Ok(());
            };
            let outcome = run_one(artifacts, &cell);
            println!(
                "{}: {:?}, {} s",
                cell.name(),
                outcome.verdict,
                outcome.seconds
            );
            let mut outcomes = outcomes.lock().unwrap_or_else(PoisonError::into_inner);
            outcomes.push(outcome);
            if let Some(path) = &results {
                let text = serde_json::to_string_pretty(&*outcomes).context("cannot encode")?;
                fs::write(path, text)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(done) => done?,
                Err(_) => bail!("a thread panicked"),
            }
        }
        Ok(())
    })?;
    Ok(outcomes
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner))
}

fn run_one(artifacts: &Artifacts, cell: &Cell) -> CellResult {
    let start = Instant::now();
    let verdict = match cell.entry.expected {
        Expected::CannotRun(reason) => Verdict::NotRun(reason.to_owned()),
        Expected::Works => match scenarios::run_scenario(artifacts, cell) {
            Ok(()) => Verdict::Passed,
            Err(error) => match error.downcast_ref::<HostUnsupported>() {
                Some(HostUnsupported(reason)) => Verdict::NotRun(reason.clone()),
                None => Verdict::Failed(format!("{error:#}")),
            },
        },
    };
    CellResult {
        row: cell.row.name.to_owned(),
        pair: cell.entry.pair,
        verdict,
        seconds: start
            .elapsed()
            .max(Duration::from_millis(500))
            .as_secs_f64()
            .round() as u64,
    }
}

/// Building rows.
impl Row {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            series: None,
            memory: 512 * MIB,
            vmm: Vmm::Qemu,
            arguments: "",
            hardware: Hardware::default(),
            properties: &[],
            features: &["stats", "free-page-hint", "free-page-reporting"],
            scenario: Scenario::Exercise,
            entries: Vec::new(),
        }
    }

    fn series(mut self, series: &'static str) -> Self {
        self.series = Some(series);
        self
    }

    fn memory(mut self, mebibytes: u64) -> Self {
        self.memory = mebibytes * MIB;
        self
    }

    fn in_user_mode_linux(mut self) -> Self {
        self.vmm = Vmm::Uml;
        self
    }

    fn arguments(mut self, arguments: &'static str) -> Self {
        self.arguments = arguments;
        self
    }

    fn hardware(mut self, hardware: Hardware) -> Self {
        self.hardware = hardware;
        self
    }

    fn properties(mut self, properties: &'static [&'static str]) -> Self {
        self.properties = properties;
        self
    }

    fn features(mut self, features: &'static [&'static str]) -> Self {
        self.features = features;
        self
    }

    fn scenario(mut self, scenario: Scenario) -> Self {
        self.scenario = scenario;
        self
    }

    fn entry(mut self, pair: Pair, is_default: bool, expected: Expected) -> Self {
        self.entries.push(Entry {
            pair,
            is_default,
            expected,
        });
        self
    }

    /// Cells that are run if all are.
    fn with(self, pairs: &[Pair]) -> Self {
        pairs
            .iter()
            .fold(self, |row, pair| row.entry(*pair, false, Expected::Works))
    }

    /// A cell that is run each time.
    fn by_default(self, pair: Pair) -> Self {
        self.entry(pair, true, Expected::Works)
    }

    /// A cell that cannot be run.
    fn not_runnable(self, pair: Pair, reason: &'static str) -> Self {
        self.entry(pair, false, Expected::CannotRun(reason))
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A matrix of machines. Each row of [`table::rows`] is a variation of the machine. Each cell is a driver and a device
//! on that machine.
//!
//! All cells do the same, [`Guest::exercise_fully`]. Rows whose variation is an event during the run have their own
//! [`scenarios`].
//!
//! [`Guest::exercise_fully`]: crate::guest::Guest::exercise_fully

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

/// The environment variable that selects the cells to run: [`ALL`], or a part of their names. If it is not set, the
/// default cells run.
pub const CELLS_VARIABLE: &str = "VIRTIO_BALLOON_RS_MATRIX";
/// The environment variable that names the file for the results.
pub const RESULTS_VARIABLE: &str = "VIRTIO_BALLOON_RS_MATRIX_RESULTS";
/// The value of [`CELLS_VARIABLE`] that selects every cell.
pub const ALL: &str = "all";

/// The number of cells that run at once beside other tests.
const AT_ONCE: usize = 2;
/// The number of cells that run at once for each two processors, without other tests.
const ALONE_AT_ONCE: usize = 3;

/// A column of the matrix: a driver and a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pair {
    /// Our driver and our device.
    Ours,
    /// The C driver and our device.
    C,
    /// Our driver and QEMU's own device.
    OursInQemu,
    /// The C driver and QEMU's own device.
    CInQemu,
}

impl Pair {
    /// All pairs.
    pub const ALL: [Self; 4] = [Self::Ours, Self::C, Self::OursInQemu, Self::CInQemu];

    /// Returns the driver.
    #[must_use]
    pub fn driver(self) -> Driver {
        match self {
            Self::Ours | Self::OursInQemu => Driver::Ours,
            Self::C | Self::CInQemu => Driver::C,
        }
    }

    /// Returns the device.
    #[must_use]
    pub fn device(self) -> Device {
        match self {
            Self::Ours | Self::C => Device::Ours,
            Self::OursInQemu | Self::CInQemu => Device::QemuOwn,
        }
    }

    /// Returns the name of the pair.
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

/// The expected result of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The cell passes.
    Works,
    /// The cell cannot run, for this reason.
    CannotRun(&'static str),
}

/// A cell of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The driver and the device.
    pub pair: Pair,
    /// Whether `make test` runs the cell by default.
    pub is_default: bool,
    /// The expected result.
    pub expected: Expected,
}

/// A variation of the default machine, which has 512 MiB of memory.
#[derive(Clone, Debug)]
pub struct Row {
    /// The name of the variation.
    pub name: &'static str,
    /// The series of the kernel; `None` for the stock kernel.
    pub series: Option<&'static str>,
    /// The size of memory, in bytes.
    pub memory: u64,
    /// The VMM that runs the machine.
    pub vmm: Vmm,
    /// Further arguments for the kernel's command line.
    pub arguments: &'static str,
    /// The machine.
    pub hardware: Hardware,
    /// Further properties of the balloon device, ours or QEMU's.
    pub properties: &'static [&'static str],
    /// The features that our device offers.
    pub features: &'static [&'static str],
    /// The scenario that the cells run.
    pub scenario: Scenario,
    /// The cells of the row.
    pub entries: Vec<Entry>,
}

/// A cell of the matrix.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The row of the cell.
    pub row: Row,
    /// The cell's entry in the row.
    pub entry: Entry,
}

impl Cell {
    /// Returns the name of the cell.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}: {}", self.row.name, self.entry.pair.name())
    }
}

/// The result of a cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The cell has passed.
    Passed,
    /// The cell has failed, with this error.
    Failed(String),
    /// The cell did not run, for this reason.
    NotRun(String),
}

/// A completed cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CellResult {
    /// The name of the row.
    pub row: String,
    /// The column.
    pub pair: Pair,
    /// The result.
    pub verdict: Verdict,
    /// The duration in seconds, at least 1.
    pub seconds: u64,
}

/// The reason why a cell cannot run on this host. The cell counts as not run, and not as failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HostUnsupported(pub String);

/// Returns the cells that `which` selects, in the format of [`CELLS_VARIABLE`].
///
/// # Errors
///
/// Fails if `which` selects no cell.
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

/// Runs the cells that [`CELLS_VARIABLE`] selects, and returns their results. After each cell, writes the results so
/// far to the file that [`RESULTS_VARIABLE`] names, if it is set.
///
/// # Errors
///
/// Fails if no cell is selected, or the results cannot be written.
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

/// Construction of rows.
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

    /// Adds cells that run only if they are selected.
    fn with(self, pairs: &[Pair]) -> Self {
        pairs
            .iter()
            .fold(self, |row, pair| row.entry(*pair, false, Expected::Works))
    }

    /// Adds a cell that runs by default.
    fn by_default(self, pair: Pair) -> Self {
        self.entry(pair, true, Expected::Works)
    }

    /// Adds a cell that cannot run.
    fn not_runnable(self, pair: Pair, reason: &'static str) -> Self {
        self.entry(pair, false, Expected::CannotRun(reason))
    }
}

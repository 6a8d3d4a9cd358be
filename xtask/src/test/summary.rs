// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The outcome of test runs.

use std::fmt::{self, Display, Formatter};
use std::process::ExitStatus;
use std::time::Duration;

use super::layers::Layer;
use super::libtest::Results;
use super::KernelSet;

/// The outcome of one layer.
#[derive(Debug, Default)]
pub struct LayerOutcome {
    passed: u64,
    ignored: u64,
    failed: Vec<Failure>,
}

/// A test that failed, or a layer that could not be tested.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    name: String,
    /// The command that repeats the test or layer.
    repeat: String,
}

impl LayerOutcome {
    /// Returns the outcome of test programs, from their results and the exit status of the command that ran them.
    pub fn from_results(layer: Layer, results: Results, status: ExitStatus) -> Self {
        let (passed, mut failed) = match layer {
            Layer::Crates | Layer::Guests(_) => (results.passed, results.failed),
            // The test that runs the KUnit cases counts only if it failed while no case did.
            Layer::Kunit(_) if results.cases_failed.is_empty() => {
                (results.cases_passed, results.failed)
            }
            Layer::Kunit(_) => (results.cases_passed, results.cases_failed),
        };
        if failed.is_empty() && !status.success() {
            let failure = format!("what builds or runs the tests ({status})");
            return Self {
                passed,
                ignored: results.ignored,
                failed: Self::from_error(layer, failure).failed,
            };
        }
        failed.sort();
        let failed = failed.into_iter().map(|name| Failure {
            repeat: repeat(layer, Some(&name)),
            name,
        });
        Self {
            passed,
            ignored: results.ignored,
            failed: failed.collect(),
        }
    }

    /// Returns the outcome of a layer whose tests could not run.
    pub fn from_error(layer: Layer, why: String) -> Self {
        Self {
            failed: vec![Failure {
                name: why,
                repeat: repeat(layer, None),
            }],
            ..Self::default()
        }
    }
}

/// Returns the command that repeats a test, or the whole layer if `test` is `None`.
fn repeat(layer: Layer, test: Option<&str>) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_:.-".contains(&byte);
    // These texts name a program instead of a test.
    let is_name = |name: &str| !name.contains(", which ") && !name.starts_with("a test of ");
    let name = test.filter(|name| is_name(name)).map(|name| {
        if name.bytes().all(plain) {
            name.to_owned()
        } else {
            format!("'{name}'")
        }
    });
    let kernels = match layer {
        Layer::Crates => {
            return match name {
                Some(name) => format!("make test T={name}"),
                None => "cargo test --no-fail-fast --workspace".to_owned(),
            }
        }
        Layer::Kunit(kernels) | Layer::Guests(kernels) => kernels,
    };
    let kernels = match kernels {
        KernelSet::Usual => "usual",
        KernelSet::Debug => "debug",
    };
    let name = name.map(|name| format!(" {name}")).unwrap_or_default();
    format!("cargo xtask test --kernels {kernels}{name}")
}

/// One run of all layers.
#[derive(Debug, Default)]
pub struct TestRun {
    layers: Vec<(Layer, LayerOutcome, Duration)>,
    /// The duration of the run.
    pub time: Duration,
    /// The load averages at the end of the run.
    pub load: String,
}

impl TestRun {
    /// Adds a layer's outcome.
    pub fn add(&mut self, layer: Layer, outcome: LayerOutcome, time: Duration) {
        self.layers.push((layer, outcome, time));
    }

    /// Returns the number of tests that passed.
    pub fn passed(&self) -> u64 {
        self.layers
            .iter()
            .map(|(_, outcome, _)| outcome.passed)
            .sum()
    }

    /// Returns the number of failures.
    pub fn failed(&self) -> usize {
        let failed = self
            .layers
            .iter()
            .map(|(_, outcome, _)| outcome.failed.len());
        failed.sum()
    }

    /// Returns whether no test passed, failed or was ignored.
    pub fn is_empty(&self) -> bool {
        let ignored: u64 = self
            .layers
            .iter()
            .map(|(_, outcome, _)| outcome.ignored)
            .sum();
        self.passed() + ignored == 0 && self.failed() == 0
    }

    fn failures(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (layer, outcome, _) in &self.layers {
            for failure in &outcome.failed {
                writeln!(f, "  failed [{layer}]: {}", failure.name)?;
                writeln!(f, "    again: {}", failure.repeat)?;
            }
        }
        Ok(())
    }
}

/// Formats a table of the layers, the failures, and a last line with the totals.
impl Display for TestRun {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (layer, outcome, time) in &self.layers {
            let LayerOutcome {
                passed,
                ignored,
                failed,
            } = outcome;
            if *passed + *ignored == 0 && failed.is_empty() {
                continue;
            }
            let layer = layer.to_string();
            let (failed, seconds) = (failed.len(), time.as_secs_f64());
            write!(f, "  {layer:<22} {passed:>5} passed {failed:>4} failed")?;
            writeln!(f, " {ignored:>4} ignored {seconds:>8.1} s")?;
        }
        self.failures(f)?;
        writeln!(f, "  in {:.1} minutes", self.time.as_secs_f64() / 60.0)?;
        write!(f, "{} passed, {} failed", self.passed(), self.failed())
    }
}

/// Several runs. Formats a line for each, all failures, and a last line with the totals.
pub struct Table<'a>(pub &'a [TestRun]);

impl Display for Table<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "  run  passed  failed  minutes  load (1, 5, 15 minutes)")?;
        for (number, run) in (1..).zip(self.0) {
            let (passed, failed) = (run.passed(), run.failed());
            let minutes = run.time.as_secs_f64() / 60.0;
            writeln!(
                f,
                "  {number:>3}  {passed:>6}  {failed:>6}  {minutes:>7.1}  {}",
                run.load
            )?;
        }
        for (number, run) in (1..).zip(self.0) {
            if run.failed() > 0 {
                writeln!(f, "  run {number}:")?;
                run.failures(f)?;
            }
        }
        let passed: u64 = self.0.iter().map(TestRun::passed).sum();
        let failed: usize = self.0.iter().map(TestRun::failed).sum();
        write!(f, "{passed} passed, {failed} failed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn results(passed: u64, failed: &[&str]) -> Results {
        Results {
            passed,
            failed: failed.iter().map(|&name| name.to_owned()).collect(),
            ..Results::default()
        }
    }

    #[test]
    fn each_failure_has_its_command_and_the_last_line_has_the_sums() {
        let (good, bad) = (ExitStatus::from_raw(0), ExitStatus::from_raw(101 << 8));
        let mut run = TestRun::default();
        let crates = LayerOutcome::from_results(
            Layer::Crates,
            results(5, &["a::b", "src/lib.rs - c (line 3)"]),
            bad,
        );
        run.add(Layer::Crates, crates, Duration::from_secs(3));
        let usual = Layer::Guests(KernelSet::Usual);
        run.add(
            usual,
            LayerOutcome::from_results(usual, results(7, &[]), good),
            Duration::from_secs(60),
        );
        let debug = Layer::Guests(KernelSet::Debug);
        run.add(
            debug,
            LayerOutcome::from_results(debug, results(1, &["c::d"]), bad),
            Duration::from_secs(60),
        );
        let text = run.to_string();
        for again in [
            "again: make test T=a::b\n",
            "again: make test T='src/lib.rs - c (line 3)'\n",
            "again: cargo xtask test --kernels debug c::d\n",
        ] {
            assert!(text.contains(again), "{text}");
        }
        assert_eq!(text.lines().last(), Some("13 passed, 3 failed"));
    }

    #[test]
    fn what_cannot_be_built_has_failed() {
        let layer = Layer::Guests(KernelSet::Usual);
        let outcome =
            LayerOutcome::from_results(layer, Results::default(), ExitStatus::from_raw(101 << 8));
        assert_eq!(outcome.failed.len(), 1);
        assert_eq!(outcome.failed[0].repeat, "cargo xtask test --kernels usual");
    }

    #[test]
    fn a_case_of_the_kernel_is_named_and_not_the_test_that_ran_it() {
        let results = Results {
            cases_passed: 4,
            cases_failed: vec!["suite.case".to_owned()],
            ..results(0, &["kunit::all"])
        };
        let layer = Layer::Kunit(KernelSet::Usual);
        let outcome = LayerOutcome::from_results(layer, results, ExitStatus::from_raw(101 << 8));
        assert_eq!((outcome.passed, outcome.failed.len()), (4, 1));
        assert_eq!(outcome.failed[0].name, "suite.case");
    }
}

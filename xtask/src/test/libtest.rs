// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Parses the output of cargo and its test programs.

use std::mem::take;

use ::harness::ktap;

/// The results of test programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Results {
    /// The number of tests that passed.
    pub passed: u64,
    /// The tests that failed.
    pub failed: Vec<String>,
    /// The number of ignored tests.
    pub ignored: u64,
    /// The number of KUnit cases that passed.
    pub cases_passed: u64,
    /// The KUnit cases that failed.
    pub cases_failed: Vec<String>,
}

/// Parses the output line by line.
#[derive(Debug, Default)]
pub struct OutputParser {
    results: Results,
    /// The last line of cargo about the program that it runs, until the line is shown.
    heading: Option<String>,
    /// The program that runs, as cargo calls it.
    name: String,
    state: State,
    failed_here: usize,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    /// Between two programs.
    #[default]
    Between,
    /// A program runs its tests.
    Running,
    /// The program prints details of failed tests.
    Details,
    /// The program has no selected test.
    Nothing,
}

impl OutputParser {
    /// Parses a line. Returns what to show: the line, and perhaps a heading before it.
    pub fn push_line(&mut self, line: &str) -> Vec<String> {
        if let Some(name) = program(line) {
            self.close();
            name.clone_into(&mut self.name);
            self.heading = Some(line.to_owned());
            return Vec::new();
        }
        if let Some(result) = ktap::parse_case_line(line) {
            match result {
                (name, true) => self.results.cases_failed.push(name.to_owned()),
                (_, false) => self.results.cases_passed += 1,
            }
        }
        match self.state {
            State::Between => {
                if let Some(count) = announced(line) {
                    self.failed_here = 0;
                    if count == 0 {
                        self.state = State::Nothing;
                        return Vec::new();
                    }
                    self.state = State::Running;
                }
            }
            State::Nothing => {
                if line.starts_with(RESULT) {
                    self.state = State::Between;
                    self.heading = None;
                }
                return Vec::new();
            }
            State::Running | State::Details => self.of_program(line),
        }
        if self.state == State::Between && line.is_empty() {
            return Vec::new();
        }
        let heading = take(&mut self.heading);
        heading.into_iter().chain([line.to_owned()]).collect()
    }

    fn of_program(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix(RESULT) {
            self.state = State::Between;
            self.results.passed += count(counts, "passed");
            self.results.ignored += count(counts, "ignored");
            // Most failures were already counted by name. The others are counted here.
            let failed = usize::try_from(count(counts, "failed")).unwrap_or_default();
            for _ in self.failed_here..failed {
                self.results.failed.push(format!("a test of {}", self.name));
            }
        } else if line == "failures:" || line == "successes:" {
            self.state = State::Details;
        } else if self.state == State::Running {
            if let Some(name) = failure(line) {
                self.results.failed.push(name.to_owned());
                self.failed_here += 1;
            }
        }
    }

    /// Ends the program that ran. A program without a result has failed.
    fn close(&mut self) {
        if matches!(self.state, State::Running | State::Details) {
            let name = format!("{}, which ended before it had a result", self.name);
            self.results.failed.push(name);
        }
        self.state = State::Between;
        self.heading = None;
    }

    /// Returns the results at the end of the output.
    pub fn finish(mut self) -> Results {
        self.close();
        self.results
    }
}

const RESULT: &str = "test result: ";

/// Returns the name of a program. Cargo prints one of these lines:
///
/// `     Running unittests src/lib.rs (target/debug/deps/guest_migration-0123456789abcdef)`
///
/// `   Doc-tests guest_migration`
fn program(line: &str) -> Option<&str> {
    if let Some(name) = line.strip_prefix("   Doc-tests ") {
        return Some(name);
    }
    let (_, path) = line.strip_prefix("     Running ")?.rsplit_once(" (")?;
    let file = path.strip_suffix(')')?.rsplit('/').next()?;
    file.rsplit_once('-').map(|(name, _)| name)
}

/// Returns the number of tests that a program announces: `running 3 tests`.
fn announced(line: &str) -> Option<u64> {
    let (number, what) = line.strip_prefix("running ")?.split_once(' ')?;
    what.starts_with("test").then_some(())?;
    number.parse().ok()
}

/// Returns the name of a failed test: `test NAME ... FAILED`.
fn failure(line: &str) -> Option<&str> {
    let (name, outcome) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    // The test program may append the time that the test took.
    outcome.starts_with("FAILED").then_some(())?;
    Some(name.strip_suffix(" - should panic").unwrap_or(name))
}

/// Returns a count of a result: `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`.
fn count(counts: &str, what: &str) -> u64 {
    let words: Vec<&str> = counts.split([' ', ';', '.']).collect();
    let number = words.windows(2).find_map(|pair| match pair {
        [number, word] if *word == what => number.parse().ok(),
        _ => None,
    });
    number.unwrap_or_default()
}

/// Returns the test names in the list of a test program: `a::name: test`.
pub fn parse_list(text: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
    names.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Results, Vec<String>) {
        let mut parser = OutputParser::default();
        let shown = text
            .lines()
            .flat_map(|line| parser.push_line(line))
            .collect();
        (parser.finish(), shown)
    }

    const TEXT: &str = "   Compiling a v0.1.0
     Running unittests src/lib.rs (target/debug/deps/a-0123456789abcdef)

running 3 tests
test one ... ok
test deep::two ... FAILED
test three - should panic ... ignored, not here

failures:

---- deep::two stdout ----
test four ... FAILED

failures:
    deep::two

test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s

     Running tests/b.rs (target/debug/deps/b-0123456789abcdef)

running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in 0.00s

   Doc-tests a

running 1 test
test src/lib.rs - c (line 3) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn results_are_summed_over_programs_and_quoted_output_is_no_result() {
        let (results, shown) = read(TEXT);
        assert_eq!((results.passed, results.ignored), (2, 1));
        assert_eq!(results.failed, ["deep::two"]);
        // A program without a selected test is not shown.
        assert!(!shown.iter().any(|line| line.contains("tests/b.rs")));
        assert!(shown.iter().any(|line| line.contains("Doc-tests a")));
    }

    #[test]
    fn a_program_that_dies_has_failed() {
        let text = "     Running tests/b.rs (target/debug/deps/b-0123456789abcdef)\n\nrunning 2 tests\ntest one ... ok\n\
                    error: test failed, to rerun pass `--test b`\n";
        let (results, _) = read(text);
        assert_eq!(results.passed, 0);
        assert_eq!(results.failed, ["b, which ended before it had a result"]);
    }

    #[test]
    fn a_failure_without_a_name_is_counted() {
        let text = "running 2 tests\ntest result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(read(text).0.failed.len(), 1);
    }

    #[test]
    fn cases_of_the_kernel_are_counted_apart() {
        let text = "running 1 test\nkunit suite.one ... ok\nkunit suite.two ... FAILED\ntest kunit::all ... FAILED\n\
                    test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let (results, _) = read(text);
        assert_eq!(results.cases_passed, 1);
        assert_eq!(results.cases_failed, ["suite.two"]);
        assert_eq!(results.failed, ["kunit::all"]);
    }

    #[test]
    fn only_tests_are_listed() {
        assert_eq!(parse_list("a::b: test\nc: bench\n\n1 test"), ["a::b"]);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A parser of KUnit results in the Kernel Test Anything Protocol (KTAP).

/// The environment variable that selects the KUnit cases to run: globs of KUnit (`suite.case`), separated by spaces.
/// The module is loaded once for each glob. If the variable is not set, all cases run.
pub const CASES_VARIABLE: &str = "VIRTIO_BALLOON_RS_KUNIT_CASES";

/// A case, or a suite as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The name: suite and case, joined by a dot.
    pub name: String,
    /// The result.
    pub status: TestStatus,
    /// The lines before the result of the case.
    pub diagnostics: Vec<String>,
}

/// The result of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestStatus {
    /// `ok`.
    Passed,
    /// `ok ... # SKIP`.
    Skipped,
    /// `not ok`.
    Failed,
}

impl Case {
    /// Returns the line that reports this case to `cargo xtask test`.
    #[must_use]
    pub fn line(&self) -> String {
        let status = match self.status {
            TestStatus::Passed => "ok",
            TestStatus::Skipped => "ignored",
            TestStatus::Failed => FAILED,
        };
        format!("{LINE}{}{SEPARATOR}{status}", self.name)
    }
}

const LINE: &str = "kunit ";
const SEPARATOR: &str = " ... ";
const FAILED: &str = "FAILED";

/// Parses a line of [`Case::line`] into the name of the case and whether it failed. Returns `None` for any other line,
/// and for a skipped case.
#[must_use]
pub fn parse_case_line(line: &str) -> Option<(&str, bool)> {
    let (name, status) = line.strip_prefix(LINE)?.split_once(SEPARATOR)?;
    match status {
        "ok" => Some((name, false)),
        FAILED => Some((name, true)),
        _ => None,
    }
}

/// Parses the results of a suite. The suite's own result is a case with the name of the suite, so that a suite without
/// cases, or with a failed setup, is visible.
#[must_use]
pub fn parse(suite: &str, text: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut diagnostics = Vec::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        match result(trimmed) {
            Some((status, name)) => {
                let name = if name == suite {
                    name.to_owned()
                } else {
                    format!("{suite}.{name}")
                };
                cases.push(Case {
                    name,
                    status,
                    diagnostics: std::mem::take(&mut diagnostics),
                });
            }
            None if boilerplate(trimmed) => {}
            None => diagnostics.push(trimmed.to_owned()),
        }
    }
    cases
}

/// Parses a result line such as `ok 1 name # SKIP why` or `not ok 2 - name`.
fn result(line: &str) -> Option<(TestStatus, &str)> {
    let (failed, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (true, rest),
        None => (false, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<u32>().ok()?;
    let rest = rest.strip_prefix("- ").unwrap_or(rest);
    let (name, directive) = rest.split_once(" # ").unwrap_or((rest, ""));
    let status = match (failed, directive.starts_with("SKIP")) {
        (true, _) => TestStatus::Failed,
        (false, true) => TestStatus::Skipped,
        (false, false) => TestStatus::Passed,
    };
    Some((status, name.trim()))
}

fn boilerplate(line: &str) -> bool {
    let starts = [
        "KTAP version",
        "TAP version",
        "# Subtest:",
        "# module:",
        "# Totals:",
    ];
    let counts = |line: &str| line.starts_with("# ") && line.contains(": pass:");
    let plan = |line: &str| {
        line.strip_prefix("1..")
            .is_some_and(|count| count.parse::<u32>().is_ok())
    };
    line.is_empty()
        || starts.iter().any(|start| line.starts_with(start))
        || plan(line)
        || counts(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULTS: &str = "KTAP version 1
1..1
    KTAP version 1
    # Subtest: ring
    # module: virtio_balloon_rs
    1..3
    ok 1 keeps_order
    # returns_each_once: EXPECTATION FAILED at ring.rs:12
    Expected 1 == 2
    not ok 2 returns_each_once
    ok 3 wraps # SKIP no ring
# ring: pass:1 fail:1 skip:1 total:3
# Totals: pass:1 fail:1 skip:1 total:3
not ok 1 ring
";

    #[test]
    fn each_case_has_its_status_and_diagnostics() {
        let cases = parse("ring", RESULTS);
        let outcomes: Vec<_> = cases
            .iter()
            .map(|case| (case.name.as_str(), case.status))
            .collect();
        let expected = [
            ("ring.keeps_order", TestStatus::Passed),
            ("ring.returns_each_once", TestStatus::Failed),
            ("ring.wraps", TestStatus::Skipped),
            ("ring", TestStatus::Failed),
        ];
        assert_eq!(outcomes, expected);
        let failed = cases
            .iter()
            .find(|case| case.name == "ring.returns_each_once")
            .unwrap();
        assert_eq!(failed.diagnostics.len(), 2);
        let lines: Vec<String> = cases.iter().map(Case::line).collect();
        let shown: Vec<_> = lines
            .iter()
            .filter_map(|line| parse_case_line(line))
            .collect();
        let expected = [
            ("ring.keeps_order", false),
            ("ring.returns_each_once", true),
            ("ring", true),
        ];
        assert_eq!(shown, expected);
    }
}

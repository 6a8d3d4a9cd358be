// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds the KUnit cases of the kernel module in its sources.

use anyhow::{ensure, Result};

use crate::paths;
use crate::sources;

/// Returns the names of all cases, as `suite.case`.
pub fn cases() -> Result<Vec<String>> {
    let sources = sources::read_all(&paths::repository()?)?;
    let module = sources
        .iter()
        .filter(|source| source.name.starts_with("guest-driver/"));
    let cases: Vec<String> = module.flat_map(|source| of(&source.text)).collect();
    ensure!(!cases.is_empty(), "the kernel module has no cases");
    Ok(cases)
}

/// Returns the cases in a source file. A suite extends to the next suite, or to the end of the file.
fn of(source: &str) -> Vec<String> {
    let mut suite = None;
    let mut marked = false;
    let mut cases = Vec::new();
    for line in source.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("#[kunit_tests(") {
            suite = name.split_once(')').map(|(name, _)| name.trim());
        } else if line == "#[test]" {
            marked = true;
        } else if let Some(rest) = line.strip_prefix("fn ").filter(|_| marked) {
            marked = false;
            let name = rest.split(['(', '<']).next().unwrap_or_default();
            cases.extend(suite.map(|suite| format!("{suite}.{name}")));
        }
    }
    cases
}

/// Returns the `filter_glob`s for KUnit runs of the cases whose names contain one of `names`; none if there is no such
/// case. Selects all cases if `names` is empty or one of them is part of `common`.
pub fn globs(cases: &[String], names: &[String], common: &str) -> Vec<String> {
    if names.is_empty() || names.iter().any(|name| common.contains(name.as_str())) {
        return vec!["*.*".to_owned()];
    }
    let mut suites: Vec<&str> = Vec::new();
    let mut globs = Vec::new();
    for case in cases {
        let Some((suite, _)) = case.split_once('.') else {
            continue;
        };
        if names.iter().any(|name| suite.contains(name.as_str())) {
            if suites.last() != Some(&suite) {
                suites.push(suite);
                globs.push(format!("{suite}.*"));
            }
        } else if names.iter().any(|name| case.contains(name.as_str())) {
            globs.push(case.clone());
        }
    }
    globs
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "fn other() {}
#[kunit_tests(ring)]
mod tests {
    #[test]
    fn keeps_order() -> Result {
    }
    fn helper() {}
    #[test]
    fn wraps() {
    }
}
";

    #[test]
    fn cases_are_functions_with_the_mark() {
        assert_eq!(of(SOURCE), ["ring.keeps_order", "ring.wraps"]);
    }

    #[test]
    fn a_name_selects_suites_and_cases() {
        let mut cases = of(SOURCE);
        cases.push("rings.other".to_owned());
        let of = |name: &str| globs(&cases, &[name.to_owned()], "kunit::every");
        assert_eq!(of("rin"), ["ring.*", "rings.*"]);
        assert_eq!(of("wrap"), ["ring.wraps"]);
        assert_eq!(of("ring.w"), ["ring.wraps"]);
        assert_eq!(of("kunit"), ["*.*"]);
        assert!(of("nothing").is_empty());
        assert_eq!(globs(&cases, &[], "kunit::every"), ["*.*"]);
    }

    #[test]
    fn the_module_has_cases() {
        let cases = cases().unwrap();
        assert!(cases.len() > 20, "{cases:?}");
        assert!(
            cases.iter().all(|case| case.split('.').count() == 2),
            "{cases:?}"
        );
    }
}

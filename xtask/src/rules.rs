// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks that each rule of hinting has at least one test whose name starts with the rule's number.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{ensure, Context, Result};

use crate::conformance;
use crate::paths;
use crate::sources;

/// Prints how many rules there are, and how many tests have their numbers.
///
/// # Errors
///
/// Fails if a rule has no test, or if there is no rule for the number of a test.
pub fn check() -> Result<()> {
    let repository = paths::repository()?;
    let path = repository.join("docs/rules.md");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let rules: BTreeSet<u32> = text.lines().filter_map(rule).collect();
    ensure!(!rules.is_empty(), "{} has no rules", path.display());
    let sources = sources::read_all(&repository)?;
    let names: BTreeSet<&str> = sources
        .iter()
        .flat_map(|source| conformance::functions(&source.text))
        .collect();
    let tests = by_number(names);
    let (bare, unknown) = mismatch(&rules, &tests);
    println!(
        "{:>5}  rules, {} tests named after them",
        rules.len(),
        tests.values().sum::<usize>()
    );
    ensure!(bare.is_empty(), "no test is named after {bare}");
    ensure!(
        unknown.is_empty(),
        "tests are named after rules that {} does not have: {unknown}",
        path.display()
    );
    Ok(())
}

/// Returns the number of tests by rule number.
fn by_number<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeMap<u32, usize> {
    let mut tests = BTreeMap::new();
    for number in names.into_iter().flat_map(numbers) {
        *tests.entry(number).or_default() += 1;
    }
    tests
}

/// Returns the rules without a test, and the numbers without a rule.
fn mismatch(rules: &BTreeSet<u32>, tests: &BTreeMap<u32, usize>) -> (String, String) {
    let numbers: BTreeSet<u32> = tests.keys().copied().collect();
    let list = |one: &BTreeSet<u32>, other| {
        let names = one.difference(other).map(|number| format!("R{number}"));
        names.collect::<Vec<_>>().join(", ")
    };
    (list(rules, &numbers), list(&numbers, rules))
}

/// Returns the number of the rule in a row of the table.
fn rule(line: &str) -> Option<u32> {
    let (first, _) = line.strip_prefix("| R")?.split_once(" |")?;
    first.parse().ok()
}

/// Returns the rule numbers at the start of a test's name: 2 and 6 for `r2_r6_hold_always`.
fn numbers(name: &str) -> impl Iterator<Item = u32> + '_ {
    name.split('_')
        .map_while(|word| word.strip_prefix('r')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_may_bear_several_numbers_and_only_at_its_start() {
        let of = |name| numbers(name).collect::<Vec<_>>();
        assert_eq!(of("r2_r16_it_holds_for_r3_too"), [2, 16]);
        assert_eq!(of("run_r2"), Vec::<u32>::new());
        assert_eq!(of("r_2"), Vec::<u32>::new());
    }

    #[test]
    fn a_rule_without_a_test_is_missed_and_so_is_a_test_without_a_rule() {
        let tests = by_number(["r1_a", "r1_r3_b", "other", "r9_c"]);
        assert_eq!(tests, BTreeMap::from([(1, 2), (3, 1), (9, 1)]));
        let (bare, unknown) = mismatch(&BTreeSet::from([1, 2, 3, 4]), &tests);
        assert_eq!((&*bare, &*unknown), ("R2, R4", "R9"));
    }

    #[test]
    fn rules_are_rows_of_the_table() {
        assert_eq!(rule("| R12 | The count | here |"), Some(12));
        assert_eq!(rule("| | rule | where |"), None);
        assert_eq!(rule("R12 holds"), None);
    }

    fn needed_by(package: &str) -> BTreeSet<String> {
        let mut cargo = crate::build::cargo().unwrap();
        cargo.args([
            "tree",
            "--quiet",
            "--package",
            package,
            "--edges",
            "normal,build",
        ]);
        let tree = crate::run::output(cargo.args(["--prefix", "none", "--format", "{p}"])).unwrap();
        let names = tree.lines().filter_map(|line| line.split(' ').next());
        names.map(str::to_owned).collect()
    }

    /// Rule R4 separates migration from virtio. The test checks all dependencies of the crates, direct or not.
    #[test]
    fn r4_migration_needs_nothing_of_virtio_and_what_knows_virtio_needs_migration() {
        let migration = needed_by("guest-migration");
        let of_virtio = |name: &&String| {
            ["virtio", "vhost", "shared-abi", "vm-memory"]
                .iter()
                .any(|part| name.contains(part))
        };
        assert_eq!(migration.iter().find(of_virtio), None);
        let daemon = needed_by("vhost-device-balloon");
        assert!(daemon.contains("guest-migration") && daemon.iter().any(|name| of_virtio(&name)));
    }
}

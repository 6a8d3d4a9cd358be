// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Holds `docs/driver.md` to the module: each parameter, counter and tracepoint has a place there.

use std::fs;

use anyhow::{ensure, Context, Result};
use regex::Regex;

use crate::paths;

const PAGE: &str = "docs/driver.md";

/// Where names are defined: the file, and an expression whose first group is the name.
const SOURCES: [(&str, &str); 3] = [
    ("guest-driver/lib.rs", r"(?m)^        (\w+): u\d+ \{$"),
    ("guest-driver/balloon/counters.rs", r"(?m)^    ([a-z_]+),$"),
    (
        "guest-driver/bindings/virtio_balloon_rs_trace.h",
        r"(?m)^(?:TRACE_EVENT\(|DEFINE_EVENT\(\w+, )(\w+),$",
    ),
];

/// Checks the page, and prints how many names it has.
///
/// # Errors
///
/// If a name is missing.
pub fn check() -> Result<()> {
    let repository = paths::repository()?;
    let read = |name: &str| {
        let path = repository.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let page = read(PAGE)?;
    let mut count = 0;
    let mut missing = Vec::new();
    for (file, expression) in SOURCES {
        let names = names(&read(file)?, expression)?;
        ensure!(!names.is_empty(), "no name found in {file}");
        count += names.len();
        missing.extend(names.into_iter().filter(|name| !page.contains(name)));
    }
    println!("{count:>5}  parameters, counters and tracepoints");
    ensure!(missing.is_empty(), "{PAGE} lacks {}", missing.join(", "));
    Ok(())
}

fn names(text: &str, expression: &str) -> Result<Vec<String>> {
    let expression = Regex::new(expression).context("cannot read an expression")?;
    let names = expression.captures_iter(text).filter_map(|it| it.get(1));
    Ok(names.map(|name| name.as_str().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_where_they_are_defined() {
        let found = |index: usize, text: &str| names(text, SOURCES[index].1).unwrap();
        assert_eq!(
            found(0, "        a_b: u8 {\n            default: 4,\n"),
            ["a_b"]
        );
        assert_eq!(
            found(1, "counters! {\n    /// X.\n    pages_in,\n"),
            ["pages_in"]
        );
        let events = "TRACE_EVENT(hint,\nDEFINE_EVENT(class, request,\n";
        assert_eq!(found(2, events), ["hint", "request"]);
    }

    /// DKMS finds the sources in a folder with the version in its name.
    #[test]
    fn dkms_has_the_version_of_the_workspace() {
        let configuration = include_str!("../../contrib/dkms/dkms.conf");
        let version = format!("PACKAGE_VERSION=\"{}\"", env!("CARGO_PKG_VERSION"));
        assert!(configuration.lines().any(|line| line == version));
        let page = include_str!("../../docs/build-module.md");
        let folder = concat!("/usr/src/virtio-balloon-rs-", env!("CARGO_PKG_VERSION"));
        assert!(page.contains(folder));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counts unsafe code by folder, and fails if there is any outside the places that the design allows.

use std::collections::BTreeMap;

use anyhow::{ensure, Result};

use crate::paths;
use crate::sources::{self, Source};

/// The folders of the kernel module that may have unsafe code: the safe abstractions of kernel interfaces.
const ALLOWED: [&str; 3] = [
    "guest-driver/bindings/",
    "guest-driver/mm/",
    "guest-driver/virtio/",
];
/// The end of the names of host files that may have unsafe code, for system calls.
const SYSTEM_MODULE: &str = "sys.rs";
/// Prints how many unsafe blocks, functions and implementations each folder has.
///
/// # Errors
///
/// Fails if there is unsafe code elsewhere.
pub fn check() -> Result<()> {
    let mut counts = BTreeMap::<String, usize>::new();
    let mut strays = Vec::new();
    for Source { name, text } in sources::read_all(&paths::repository()?)? {
        let found = count(&text);
        if found == 0 {
            continue;
        }
        let folder = name
            .rsplit_once('/')
            .map_or(name.as_str(), |(folder, _)| folder);
        *counts.entry(folder.to_owned()).or_default() += found;
        let host_system_module =
            !name.starts_with("guest-driver/") && name.ends_with(SYSTEM_MODULE);
        if !host_system_module && !ALLOWED.iter().any(|allowed| name.starts_with(allowed)) {
            strays.push(name);
        }
    }
    for (folder, count) in &counts {
        println!("{count:>5}  {folder}");
    }
    println!("{:>5}  in all", counts.values().sum::<usize>());
    ensure!(
        strays.is_empty(),
        "unsafe code outside its places: {}",
        strays.join(", ")
    );
    Ok(())
}

/// Returns the number of lines with unsafe code. Ignores comments, attributes, and lines with a quotation mark.
fn count(text: &str) -> usize {
    let code = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    let code = code.filter(|line| !line.trim_start().starts_with("#"));
    let keyword = [
        "unsafe {",
        "unsafe fn",
        "unsafe impl",
        "unsafe trait",
        "unsafe extern",
    ];
    code.filter(|line| {
        keyword
            .iter()
            .any(|keyword| line.contains(keyword) && !line.contains('"'))
    })
    .count()
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn only_the_keyword_counts() {
        let text = "#![forbid(unsafe_code)]\n// unsafe { }\nlet x = unsafe { y() }; // SAFETY: unsafe {\nunsafe_count();\n";
        assert_eq!(count(text), 1);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counts unsafe code by folder, and fails if there is any outside the places that the design allows.

use std::collections::BTreeMap;

use anyhow::{ensure, Context, Result};

use crate::paths;
use crate::same_code::tokens::{self, Kind};
use crate::same_code::Renames;
use crate::sources::{self, Source};

/// The folders of the kernel module that may have unsafe code: the safe abstractions of kernel interfaces.
const ALLOWED: [&str; 3] = [
    "guest-driver/bindings/",
    "guest-driver/mm/",
    "guest-driver/virtio/",
];
/// The name of host files that may have unsafe code, for system calls.
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
        let found = count(&name, &text)?;
        if found == 0 {
            continue;
        }
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", &name));
        *counts.entry(folder.to_owned()).or_default() += found;
        let host_system_module = !name.starts_with("guest-driver/") && file == SYSTEM_MODULE;
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

/// Returns the number of unsafe blocks, functions, implementations, traits and extern blocks.
fn count(name: &str, text: &str) -> Result<usize> {
    let tokens = tokens::parse(text, &Renames::default(), name).context(name.to_owned())?;
    let pairs = tokens.iter().zip(tokens.iter().skip(1));
    let uses = pairs.filter(|(keyword, next)| {
        let is_keyword = matches!(&keyword.kind, Kind::Word(word) if word == "unsafe");
        let starts_code = match &next.kind {
            Kind::Word(word) => ["fn", "impl", "trait", "extern"].contains(&word.as_str()),
            Kind::Other(other) => other == "{",
            Kind::Text(_) => false,
        };
        is_keyword && starts_code
    });
    Ok(uses.count())
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn only_the_keyword_counts() {
        let text = "#![forbid(unsafe_code)]\n// unsafe { }\nconst T: &str = \"unsafe {\";\nunsafe extern \"C\" {}\nfn f() { unsafe { y() }; unsafe_count(); }\n";
        assert_eq!(count("x.rs", text).unwrap(), 2);
    }
}

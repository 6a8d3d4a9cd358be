// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! End-to-end tests, which boot guests. `cargo xtask test` builds the artifacts that they need and runs them.

mod debug_kernel;
mod driver_cost;
mod features;
mod hinted_blocks;
mod hinting_rules;
mod hints;
mod interoperability;
mod interrupted_hint_rounds;
mod kunit;
mod lifecycle;
mod matrix;
mod migrate_vm;
mod migration;
mod migration_faults;
mod pausing;
mod reporting;
mod resize;
mod soft_dirty;
mod stress;

/// Checks that this file declares every module in the folder. Cargo does not compile an undeclared file, so its tests
/// would silently not run.
#[test]
fn each_file_here_is_part_of_this_program() {
    let folder = env!("CARGO_MANIFEST_DIR");
    let this = include_str!("main.rs");
    for entry in std::fs::read_dir(folder).expect("this folder is there") {
        let name = entry.expect("it can be listed").file_name();
        let name = name.to_string_lossy();
        let Some(module) = name.strip_suffix(".rs") else {
            continue;
        };
        assert!(
            module == "main" || this.contains(&format!("mod {module};")),
            "{module} is not named in main.rs"
        );
    }
}

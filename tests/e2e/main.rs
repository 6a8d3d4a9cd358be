// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! End-to-end tests, which boot guests. `cargo xtask test` builds the artifacts that they need and runs them.

mod bind;
mod counters;
mod daemon;
mod debug_kernel;
mod documents;
mod driver_cost;
mod driver_removal;
mod fault_injection;
mod features;
mod hint_reserve;
mod hinted_blocks;
mod hinted_contents;
mod hinting_rules;
mod hints;
mod hotplug;
mod interoperability;
mod interrupted_hint_rounds;
mod kexec;
mod kunit;
mod load_cycles;
mod matrix;
mod memory_hotplug;
mod migrate_vm;
mod migration;
mod migration_faults;
mod module_parameters;
mod must_tell_host;
mod oom_deflation;
mod page_clearing;
mod page_migration;
mod page_poison;
mod pausing;
mod reporting;
mod resize;
mod sample_driver;
mod silent_device;
mod soft_dirty;
mod stress;
mod suspend;
mod tracepoints;
mod transports;

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

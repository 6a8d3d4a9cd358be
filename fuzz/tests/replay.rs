// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs each fuzz target with its corpus and with the inputs that once showed a defect.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use fuzz_targets::Target;

/// Targets count the descriptors of the whole process, so one test at a time opens files.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs `target` with each file of `corpus/` and `regressions/`.
fn replay(target: Target) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for folder in ["corpus", "regressions"] {
        let folder = root.join(folder).join(target.name());
        let Ok(files) = fs::read_dir(&folder) else {
            assert_eq!(folder.parent().unwrap(), root.join("regressions"));
            continue;
        };
        let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        files.sort();
        for file in files {
            // The test harness shows this if the target panics.
            println!("{}", file.display());
            target.run(&fs::read(&file).unwrap());
            count += 1;
        }
    }
    assert!(count > 0, "no input");
    println!("{count} inputs");
}

#[test]
fn fuzz_inputs_of_queues_pass() {
    replay(Target::Queues);
}

#[test]
fn fuzz_inputs_of_vhost_user_pass() {
    replay(Target::VhostUser);
}

#[test]
fn fuzz_inputs_of_qmp_pass() {
    replay(Target::Qmp);
}

#[test]
fn fuzz_inputs_of_config_pass() {
    replay(Target::Config);
}

#[test]
fn fuzz_inputs_of_saved_state_pass() {
    replay(Target::SavedState);
}

#[test]
fn fuzz_inputs_of_stream_pass() {
    replay(Target::Stream);
}

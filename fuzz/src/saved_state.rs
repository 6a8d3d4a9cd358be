// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Target `saved_state`: a file that a new daemon restores.
//!
//! The input is the file. The target checks that a state which can be read is written and read again without a change,
//! that a device which has restored it has exactly this state and serves an honest driver, and that a state which cannot
//! be restored leaves the device unchanged.

use std::fs;
use std::sync::Arc;

use shared_abi::features::Features;
use vhost_device_balloon::device::saved_state::SavedState;
use vhost_device_balloon::device::Device;

use crate::guest::{device, Guest, ALL};

pub fn run(bytes: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("state");
    fs::write(&path, bytes).expect("a file");
    let state = match SavedState::read(&path) {
        Ok(state) => state,
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() < 1 << 13, "an error of {} bytes", text.len());
            return;
        }
    };
    let copy = directory.path().join("copy");
    state.write(&copy).expect("the state can be written");
    let again = SavedState::read(&copy).expect("the written state can be read");
    assert_eq!(again, state);
    assert_eq!(
        fs::read_dir(directory.path()).expect("a directory").count(),
        2,
        "temporary files are left"
    );
    for offered in [ALL, ALL.without(Features::PAGE_POISON), Features::NONE] {
        restore(&state, offered);
    }
}

fn restore(state: &SavedState, offered: Features) {
    let mut device = device(offered, Arc::default());
    let fresh = device.saved_state();
    let Err(error) = device.restore(state) else {
        check_restored(state, device);
        return;
    };
    assert!(error.to_string().len() < 1 << 10);
    assert_eq!(device.saved_state(), fresh, "{error}");
}

fn check_restored(state: &SavedState, device: Device) {
    let value = |state: &SavedState| serde_json::to_value(state).expect("a saved state");
    let (mut before, mut after) = (value(state), value(&device.saved_state()));
    // A hint round is over: the driver releases its hinted blocks (R16).
    let command_id = match before["command-id"].as_u64() {
        Some(0) => 0,
        _ => 1,
    };
    assert_eq!(after["command-id"], command_id);
    for state in [&mut before, &mut after] {
        state["command-id"] = 0.into();
        // The names are a set.
        if let Some(names) = state["negotiated-features"].as_array_mut() {
            names.sort_by_key(ToString::to_string);
            names.dedup();
        }
    }
    assert_eq!(before, after);
    Guest::new(device).check_honest_driver();
}

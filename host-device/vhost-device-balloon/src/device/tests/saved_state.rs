// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saving and restoring (R9).

use std::sync::Arc;

use serde_json::json;
use shared_abi::config::ConfigSpace;
use shared_abi::features::Features;

use super::{Guest, ALL, LENGTH};
use crate::device::{saved_state, Device};
use crate::relay::ConfigNotifier;

#[test]
fn r9_the_saved_state_goes_on_in_a_fresh_device() {
    let mut guest = Guest::new(ALL, ALL);
    guest.device.set_target(LENGTH).unwrap();
    guest.device.write_config(4, &7u32.to_le_bytes());
    guest.device.write_config(12, &0xaaaa_aaaau32.to_le_bytes());
    let used: Vec<_> = (0..3).map(|_| guest.start_hint_round()).collect();
    let before = guest.config();
    // The JSON text that QMP clients and files get.
    let text = serde_json::to_string(&guest.device.saved_state()).unwrap();
    let saved: saved_state::SavedState = serde_json::from_str(&text).unwrap();
    assert_eq!(saved, guest.device.saved_state());

    let mut device = Device::new(ALL, Arc::default());
    device.restore(&saved).unwrap();
    assert_eq!(device.saved_state().clone(), {
        let value = serde_json::to_value(&saved).unwrap();
        let mut value = value.as_object().unwrap().clone();
        value.insert("command-id".into(), 1.into());
        serde_json::from_value(value.into()).unwrap()
    });
    // The same driver continues: it has the same features, and writes nothing again.
    device.front_end_connected(Arc::<ConfigNotifier>::default());
    device.set_features(ALL.bits());
    let config = ConfigSpace::from_bytes(device.read_config(0, 16).try_into().unwrap());
    assert_eq!(
        (config.num_pages, config.actual, config.poison_val),
        (before.num_pages, 7, 0xaaaa_aaaa)
    );
    // R16: the hint round is over, and the guest frees its hinted blocks.
    assert_eq!(config.free_page_hint_cmd_id, 1);
    // R8: no id is issued twice.
    let mut next = Guest::with_device(device, ALL);
    assert_eq!(next.device.start_hinting().unwrap(), used[2].successor());
    // A driver with other features is a new driver: its poison value starts at 0.
    next.start_driver(Features::PAGE_POISON);
    assert_eq!(next.config().poison_val, 0);
}

#[test]
fn r9_a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let good = serde_json::to_value(Guest::new(ALL, ALL).device.saved_state()).unwrap();
    for (key, value, word) in [
        ("next-hint-id", json!(0x7fff_ffff), "0x7fffffff"),
        ("command-id", json!(2), "0x2, which is reserved"),
        ("negotiated-features", json!(["stats", "wings"]), "'wings'"),
        (
            "negotiated-features",
            json!(["discard-hinted"]),
            "uses discard-hinted",
        ),
    ] {
        let mut state = good.clone();
        state[key] = value;
        let state: saved_state::SavedState = serde_json::from_value(state).unwrap();
        let mut device = Device::new(ALL, Arc::default());
        let before = device.saved_state();
        let error = device.restore(&state).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(device.saved_state(), before);
    }
}

#[test]
fn a_file_that_is_not_regular_is_refused_without_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for path in [fifo.as_path(), "/dev/zero".as_ref(), directory.path()] {
        let error = saved_state::SavedState::read(path).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn saving_replaces_regular_files_only() {
    let directory = tempfile::tempdir().unwrap();
    let state = Guest::new(ALL, ALL).device.saved_state();
    let socket = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [socket.as_path(), directory.path(), "/dev/null".as_ref()] {
        let error = state.write(path).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let file = directory.path().join("file");
    for _ in 0..2 {
        state.write(&file).unwrap();
        assert_eq!(saved_state::SavedState::read(&file).unwrap(), state);
    }
    assert_eq!(directory.path().read_dir().unwrap().count(), 2);
}

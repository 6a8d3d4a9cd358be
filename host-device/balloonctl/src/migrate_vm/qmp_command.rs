// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QMP commands, and those that more than one module sends.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

/// A QMP command.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct QmpCommand {
    /// Name of the command.
    pub execute: String,
    /// Arguments of the command.
    pub arguments: Value,
}

/// Returns the command that sets a capability.
#[must_use]
pub fn set_capability(name: &str, state: bool) -> QmpCommand {
    let one = json!({ "capability": name, "state": state });
    command("migrate-set-capabilities", json!({ "capabilities": [one] }))
}

pub(super) fn command(name: &str, arguments: Value) -> QmpCommand {
    QmpCommand {
        execute: name.to_owned(),
        arguments,
    }
}

/// Returns the command that connects a chardev to a daemon.
pub(super) fn chardev_add(id: &str, socket: &Path) -> QmpCommand {
    let address = json!({ "type": "unix", "data": { "path": socket } });
    let data = json!({ "addr": address, "server": false });
    let backend = json!({ "type": "socket", "data": data });
    command("chardev-add", json!({ "id": id, "backend": backend }))
}

/// Returns the command that plugs the balloon in.
pub(super) fn device_add(device: &Map<String, Value>, bus: &str, chardev: &str) -> QmpCommand {
    let mut device = device.clone();
    device.insert("bus".into(), bus.into());
    device.insert("chardev".into(), chardev.into());
    command("device_add", device.into())
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checks whether a guest can be migrated, and collects the settings of its balloon. Changes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use guest_migration::status::MigrationInfo;
use qmp_client::Client;
use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::connections::{peripheral, property, Connections, RunState};
use super::peer::Peer;
use crate::args::MigrateVm;
use crate::error::CommandError;

/// The result of the checks.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Preflight {
    /// Arguments of `device_add` for the balloon, without bus and chardev.
    pub device: Map<String, Value>,
    /// The bus of the balloon at the source.
    pub bus: String,
    /// The chardev of the balloon at the source.
    pub chardev: String,
    /// The vhost-user socket of the daemon at the source.
    pub socket: PathBuf,
    /// The bus for the balloon at the destination.
    pub destination_bus: String,
    /// The chardev for the balloon at the destination.
    pub destination_chardev: String,
    /// The QEMUs that exclude guest memory from their own migration already.
    pub ignores_shared: Vec<Peer>,
}

/// The capability of QEMU that leaves memory in shared files out of the migration.
pub(super) const IGNORE_SHARED: &str = "x-ignore-shared";

/// Runs all checks.
///
/// # Errors
///
/// [`CommandError::Failed`] with one sentence for each check that failed, or the error of a connection that failed.
pub fn preflight(
    connections: &mut Connections,
    options: &MigrateVm,
) -> Result<Preflight, CommandError> {
    let mut wrong = Vec::new();
    if !(options.to.starts_with("unix:") || options.to.starts_with("tcp:")) {
        wrong.push(format!(
            "--to needs a receiver that confirms the memory: unix:PATH or tcp:HOST:PORT, not '{}'",
            options.to
        ));
    }
    check_states(connections, &mut wrong)?;
    check_memory(connections, &mut wrong)?;
    let device = inspect_device(connections, options, &mut wrong)?;
    match device {
        Some(preflight) if wrong.is_empty() => Ok(preflight),
        _ => Err(CommandError::Failed(format!(
            "guest cannot be migrated, nothing was changed: {}",
            wrong.join("; ")
        ))),
    }
}

fn check_states(
    connections: &mut Connections,
    wrong: &mut Vec<String>,
) -> Result<(), CommandError> {
    let source: RunState = connections.source.query("query-status")?;
    if !source.running {
        wrong.push(format!(
            "source is {}, but its guest must run to release the balloon: resume it",
            source.status
        ));
    }
    let destination: RunState = connections.destination.query("query-status")?;
    if destination.status != "inmigrate" {
        wrong.push(format!(
            "destination is {} and does not wait for a guest: start it with -incoming defer",
            destination.status
        ));
    }
    let memory: MigrationInfo = connections.daemon.query("query-migrate")?;
    if !memory.status.is_over() {
        wrong.push(format!(
            "daemon already has a migration in state {}: wait, or cancel it",
            memory.status.name()
        ));
    }
    Ok(())
}

/// A memory backend of QEMU.
#[derive(Debug, PartialEq)]
struct MemoryBackend {
    kind: String,
    share: bool,
    size: u64,
}

/// Checks the memory backends: QEMU leaves memory out of its own migration only if it is in a shared file with a name.
fn check_memory(
    connections: &mut Connections,
    wrong: &mut Vec<String>,
) -> Result<(), CommandError> {
    let source = backends(&mut connections.source)?;
    let destination = backends(&mut connections.destination)?;
    if source.is_empty() {
        wrong.push("source has no memory backend: see balloonctl migrate-vm --help".into());
    }
    for (peer, all) in [("source", &source), ("destination", &destination)] {
        for (id, backend) in all {
            if backend.kind != "memory-backend-file" || !backend.share {
                let share = if backend.share { "on" } else { "off" };
                wrong.push(format!(
                    "memory backend '{id}' of the {peer} must be a memory-backend-file with share=on, not a {} with share={share}",
                    backend.kind
                ));
            }
        }
    }
    let sizes = |all: &BTreeMap<String, MemoryBackend>| -> Vec<(String, u64)> {
        let sizes = all.iter().map(|(id, backend)| (id.clone(), backend.size));
        sizes.collect()
    };
    if sizes(&source) != sizes(&destination) {
        wrong.push(format!(
            "memory backends of source and destination differ: {:?} and {:?} bytes",
            sizes(&source),
            sizes(&destination)
        ));
    }
    Ok(())
}

/// A property of a QOM object.
#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

fn backends(qemu: &mut Client) -> Result<BTreeMap<String, MemoryBackend>, CommandError> {
    let objects = qemu.command("qom-list", json!({ "path": "/objects" }))?;
    let objects = Vec::<Property>::deserialize(&objects)
        .map_err(|error| unexpected_response(qemu, &error))?;
    let mut found = BTreeMap::new();
    for object in objects {
        let kind = object.kind.strip_prefix("child<");
        let kind = kind.and_then(|kind| kind.strip_suffix('>'));
        let Some(kind) = kind.filter(|kind| kind.starts_with("memory-backend-")) else {
            continue;
        };
        let path = format!("/objects/{}", object.name);
        let share = property(qemu, &path, "share")?;
        let size = property(qemu, &path, "size")?;
        let backend = MemoryBackend {
            kind: kind.to_owned(),
            share: share == Some(true.into()),
            size: size.and_then(|size| size.as_u64()).unwrap_or_default(),
        };
        found.insert(object.name, backend);
    }
    Ok(found)
}

fn inspect_device(
    connections: &mut Connections,
    options: &MigrateVm,
    wrong: &mut Vec<String>,
) -> Result<Option<Preflight>, CommandError> {
    let id = &options.device;
    let source = &mut connections.source;
    let text = |value: Option<Value>| value.and_then(|value| value.as_str().map(str::to_owned));
    let driver = text(property(source, &peripheral(id), "type")?);
    let chardev = text(property(source, &peripheral(id), "chardev")?);
    let (Some(driver), Some(chardev)) = (driver, chardev) else {
        wrong.push(format!(
            "source has no vhost-user device '{id}': set --device to the id of the balloon"
        ));
        return Ok(None);
    };
    let bus = text(property(source, &peripheral(id), "parent_bus")?);
    // The last component of the path is the name of the bus.
    let bus = bus.and_then(|path| path.rsplit('/').next().map(str::to_owned));
    let bus = bus.unwrap_or_default();
    let socket = match &options.source_device_socket {
        Some(socket) => Some(socket.clone()),
        None => chardev_sockets(source)?.remove(&chardev).flatten(),
    };
    let Some(socket) = socket else {
        wrong.push(format!(
            "QEMU does not report the socket of chardev '{chardev}': set --source-device-socket"
        ));
        return Ok(None);
    };
    let device = properties(source, id, &driver)?;
    let destination_bus = options.bus.clone().unwrap_or_else(|| bus.clone());
    let destination = &mut connections.destination;
    if property(destination, &peripheral(&destination_bus), "type")?.is_none() {
        wrong.push(format!(
            "destination has no slot '{destination_bus}': set --bus to the id of an empty one"
        ));
    }
    if property(destination, &peripheral(id), "type")?.is_some() {
        wrong.push(format!(
            "destination already has a device '{id}': start it without the balloon"
        ));
    }
    if chardev_sockets(destination)?.contains_key(&chardev) {
        wrong.push(format!(
            "destination already has a chardev '{chardev}': start it without this chardev"
        ));
    }
    let mut ignores_shared = Vec::new();
    for peer in [Peer::Source, Peer::Destination] {
        if let Some(qemu) = connections.client_mut(peer) {
            if has_capability(qemu, IGNORE_SHARED)? {
                ignores_shared.push(peer);
            }
        }
    }
    Ok(Some(Preflight {
        ignores_shared,
        device,
        bus,
        destination_chardev: chardev.clone(),
        chardev,
        socket,
        destination_bus,
    }))
}

/// Returns whether a capability of QEMU's migration is on.
fn has_capability(qemu: &mut Client, name: &str) -> Result<bool, CommandError> {
    #[derive(Deserialize)]
    struct Capability {
        capability: String,
        state: bool,
    }
    let all: Vec<Capability> = qemu.query("query-migrate-capabilities")?;
    Ok(all.iter().any(|it| it.capability == name && it.state))
}

/// Returns the chardevs, each with the path of its Unix socket if QEMU is the client of that socket.
fn chardev_sockets(qemu: &mut Client) -> Result<BTreeMap<String, Option<PathBuf>>, CommandError> {
    #[derive(Deserialize)]
    struct Chardev {
        label: String,
        filename: String,
    }
    let chardevs: Vec<Chardev> = qemu.query("query-chardev")?;
    let socket = |filename: &str| {
        let path = filename.strip_prefix("unix:")?;
        (!path.is_empty() && !path.contains(",server")).then(|| Path::new(path).to_owned())
    };
    let all = chardevs
        .iter()
        .map(|chardev| (chardev.label.clone(), socket(&chardev.filename)));
    Ok(all.collect())
}

/// Returns the properties with which the device was created: those that differ from their defaults. Skips properties
/// that are on by default, because only the features of the daemon turn them off.
fn properties(
    qemu: &mut Client,
    id: &str,
    driver: &str,
) -> Result<Map<String, Value>, CommandError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Known {
        name: String,
        #[serde(default)]
        default_value: Option<Value>,
    }
    let known = qemu.command("device-list-properties", json!({ "typename": driver }))?;
    let known =
        Vec::<Known>::deserialize(&known).map_err(|error| unexpected_response(qemu, &error))?;
    let mut device = Map::new();
    device.insert("driver".into(), driver.into());
    device.insert("id".into(), id.into());
    for Known {
        name,
        default_value,
    } in known
    {
        let Some(default) = default_value else {
            continue;
        };
        if default == Value::Bool(true) || name == "addr" {
            continue;
        }
        match property(qemu, &peripheral(id), &name)? {
            Some(value) if value != default => device.insert(name, value),
            _ => None,
        };
    }
    Ok(device)
}

fn unexpected_response(qemu: &Client, error: &serde_json::Error) -> CommandError {
    CommandError::Failed(format!(
        "{} sent an unexpected response: {error}",
        qemu.peer()
    ))
}

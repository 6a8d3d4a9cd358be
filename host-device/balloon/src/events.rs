// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Events for operators.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};
use tracing::warn;

use crate::lock;

/// Sends events to all who listen. Never waits for one of them: who does not read loses events.
#[derive(Debug, Default)]
pub struct Events {
    listeners: Mutex<Vec<Listener>>,
}

#[derive(Debug)]
struct Listener {
    lines: SyncSender<String>,
    lost: u64,
}

impl Events {
    /// Sends each event as a line of JSON to `lines` from now on, until its other end is dropped.
    pub fn listen(&self, lines: SyncSender<String>) {
        lock(&self.listeners).push(Listener { lines, lost: 0 });
    }

    /// Sends the event `name` with `data` to everybody.
    pub fn emit(&self, name: &str, data: Value) {
        tracing::debug!("event {name} {data}");
        let mut listeners = lock(&self.listeners);
        if listeners.is_empty() {
            return;
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let line = json!({
            "event": name,
            "data": data,
            "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        })
        .to_string();
        listeners.retain_mut(|listener| match listener.lines.try_send(line.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                if listener.lost == 0 {
                    warn!("an operator does not read its events: they are dropped");
                }
                listener.lost += 1;
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        });
    }
}

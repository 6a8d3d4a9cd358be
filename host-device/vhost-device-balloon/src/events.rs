// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Events for operators.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};
use tracing::warn;

use crate::lock;

/// Sends events to all who listen. Never waits for one of them: who does not read loses events.
#[derive(Debug, Default)]
pub struct Events {
    listeners: Mutex<Listeners>,
}

#[derive(Debug, Default)]
struct Listeners {
    all: Vec<Listener>,
    next: u64,
}

#[derive(Debug)]
struct Listener {
    number: u64,
    lines: SyncSender<String>,
    lost: u64,
}

/// Events come as long as this lives.
#[derive(Debug)]
#[must_use = "dropping it ends the events"]
pub struct Listening {
    events: Arc<Events>,
    number: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        lock(&self.events.listeners)
            .all
            .retain(|listener| listener.number != self.number);
    }
}

impl Events {
    /// Sends each event as a line of JSON to `lines` from now on.
    pub fn listen(self: &Arc<Self>, lines: SyncSender<String>) -> Listening {
        let mut listeners = lock(&self.listeners);
        let number = listeners.next;
        listeners.next += 1;
        listeners.all.push(Listener {
            number,
            lines,
            lost: 0,
        });
        Listening {
            events: self.clone(),
            number,
        }
    }

    /// Sends the event `name` with `data` to everybody.
    pub fn emit(&self, name: &str, data: Value) {
        tracing::debug!("event {name} {data}");
        let mut listeners = lock(&self.listeners);
        if listeners.all.is_empty() {
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
        for listener in &mut listeners.all {
            if let Err(TrySendError::Full(_)) = listener.lines.try_send(line.clone()) {
                if listener.lost == 0 {
                    warn!("an operator does not read its events: they are dropped");
                }
                listener.lost += 1;
            }
        }
    }
}

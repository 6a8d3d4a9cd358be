// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Events for QMP clients.

use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};
use tracing::warn;

use crate::sync::lock;

/// Sends events to all subscribers. Never waits for a subscriber: a subscriber that does not read loses events.
#[derive(Debug, Default)]
pub struct Events {
    subscribers: Mutex<Subscribers>,
}

#[derive(Debug, Default)]
struct Subscribers {
    all: Vec<Subscriber>,
    next: u64,
}

#[derive(Debug)]
struct Subscriber {
    number: u64,
    lines: SyncSender<String>,
    lost: u64,
}

/// A subscription to events. Dropping it ends the subscription.
#[derive(Debug)]
#[must_use = "dropping it ends the events"]
pub struct Subscription {
    events: Arc<Events>,
    number: u64,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.events.subscribers)
            .all
            .retain(|subscriber| subscriber.number != self.number);
    }
}

impl Events {
    /// Subscribes `lines`. Each later event is sent as one line of JSON.
    pub fn subscribe(self: &Arc<Self>, lines: SyncSender<String>) -> Subscription {
        let mut subscribers = lock(&self.subscribers);
        let number = subscribers.next;
        subscribers.next += 1;
        subscribers.all.push(Subscriber {
            number,
            lines,
            lost: 0,
        });
        Subscription {
            events: self.clone(),
            number,
        }
    }

    /// Sends the event `name` with `data` to all subscribers.
    pub fn emit(&self, name: &str, data: Value) {
        tracing::debug!("event {name} {data}");
        let mut subscribers = lock(&self.subscribers);
        if subscribers.all.is_empty() {
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
        for subscriber in &mut subscribers.all {
            if let Err(TrySendError::Full(_)) = subscriber.lines.try_send(line.clone()) {
                if subscriber.lost == 0 {
                    warn!("QMP client does not read its events; new events are dropped");
                }
                subscriber.lost += 1;
            }
        }
    }
}

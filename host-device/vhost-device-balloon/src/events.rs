// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Events for QMP clients.
//!
//! A guest can cause some events as often as it likes. As in QEMU's monitor, these are sent once in a second at most:
//! the first one at once, and the latest of those that follow at the end of the second.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};

use crate::sync::lock;

/// The interval of events whose rate is limited.
const RATELIMIT_INTERVAL: Duration = Duration::from_secs(1);

/// The events whose rate is limited. Their data is a state, so that only the latest one matters.
const RATELIMITED: [&str; 2] = ["BALLOON_CHANGE", "DRIVER_STARTED"];

/// A receiver of events.
pub trait EventSink: Send + Sync + fmt::Debug {
    /// Takes an event: one line of JSON. Runs under the device's lock: it must neither wait nor lock the device. A
    /// receiver without room drops the event.
    fn send(&self, line: &str);
}

/// Sends events to all subscribers. Never waits for a subscriber: a subscriber that does not read loses events.
#[derive(Debug, Default)]
pub struct Events {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    subscribers: Vec<Subscriber>,
    next: u64,
    /// The intervals of the events in [`RATELIMITED`], at the same index.
    intervals: [Interval; RATELIMITED.len()],
}

#[derive(Debug)]
struct Subscriber {
    number: u64,
    sink: Arc<dyn EventSink>,
}

/// The interval that began when an event was sent.
#[derive(Debug, Default)]
struct Interval {
    /// `None` if the last interval has ended.
    end: Option<Instant>,
    /// The data to send at the end.
    latest: Option<Value>,
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
        lock(&self.events.state)
            .subscribers
            .retain(|subscriber| subscriber.number != self.number);
    }
}

impl Events {
    /// Subscribes `sink`. Each later event is sent as one line of JSON.
    pub fn subscribe(self: &Arc<Self>, sink: Arc<dyn EventSink>) -> Subscription {
        let mut state = lock(&self.state);
        let number = state.next;
        state.next += 1;
        state.subscribers.push(Subscriber { number, sink });
        Subscription {
            events: self.clone(),
            number,
        }
    }

    /// Sends the event `name` with `data` to all subscribers, or keeps it until the end of its interval.
    pub fn emit(&self, name: &'static str, data: Value) {
        self.emit_at(name, data, Instant::now());
    }

    /// Sends the events whose interval has ended. Returns when the next interval ends, if there is one. Subscribers
    /// call this each time they wake up, and by then at the latest.
    pub fn send_delayed(&self) -> Option<Instant> {
        self.send_delayed_at(Instant::now())
    }

    fn emit_at(&self, name: &'static str, data: Value, now: Instant) {
        tracing::debug!("event {name} {data}");
        let mut state = lock(&self.state);
        if state.subscribers.is_empty() {
            return;
        }
        let index = RATELIMITED.iter().position(|limited| *limited == name);
        if let Some(interval) = index.and_then(|index| state.intervals.get_mut(index)) {
            if interval.end.is_some_and(|end| now < end) {
                interval.latest = Some(data);
                return;
            }
            interval.latest = None;
            interval.end = now.checked_add(RATELIMIT_INTERVAL);
        }
        state.send(name, &data);
    }

    fn send_delayed_at(&self, now: Instant) -> Option<Instant> {
        let mut state = lock(&self.state);
        for (index, name) in RATELIMITED.into_iter().enumerate() {
            let interval = state.intervals.get_mut(index);
            let Some(interval) = interval.filter(|it| it.end.is_some_and(|end| now >= end)) else {
                continue;
            };
            interval.end = None;
            if let Some(data) = interval.latest.take() {
                interval.end = now.checked_add(RATELIMIT_INTERVAL);
                state.send(name, &data);
            }
        }
        state.intervals.iter().filter_map(|it| it.end).min()
    }
}

impl State {
    fn send(&self, name: &str, data: &Value) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let line = json!({
            "event": name,
            "data": data,
            "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        })
        .to_string();
        for subscriber in &self.subscribers {
            subscriber.sink.send(&line);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Keeps all events.
    #[derive(Debug, Default)]
    pub(crate) struct Lines(Mutex<Vec<String>>);

    impl Lines {
        pub(crate) fn take(&self) -> Vec<String> {
            std::mem::take(&mut *lock(&self.0))
        }
    }

    impl EventSink for Lines {
        fn send(&self, line: &str) {
            lock(&self.0).push(line.to_owned());
        }
    }

    fn data(lines: &Lines) -> Vec<Value> {
        lines
            .take()
            .iter()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["data"].clone())
            .collect()
    }

    #[test]
    fn a_flood_of_an_event_becomes_one_in_a_second_and_the_latest_is_not_lost() {
        let (events, lines) = (Arc::new(Events::default()), Arc::new(Lines::default()));
        let _subscription = events.subscribe(lines.clone());
        let start = Instant::now();
        for number in 0..1000 {
            events.emit_at("BALLOON_CHANGE", json!(number), start);
        }
        assert_eq!(data(&lines), [json!(0)]);
        let end = events.send_delayed_at(start).unwrap();
        assert_eq!(end, start + RATELIMIT_INTERVAL);
        assert_eq!(data(&lines), [] as [Value; 0]);
        // The delayed event begins another interval.
        let second = events.send_delayed_at(end).unwrap();
        events.emit_at("BALLOON_CHANGE", json!(1000), end);
        assert_eq!(data(&lines), [json!(999)]);
        let third = events.send_delayed_at(second).unwrap();
        assert_eq!(data(&lines), [json!(1000)]);
        // An interval without events ends.
        assert_eq!(events.send_delayed_at(third), None);
        assert_eq!(data(&lines), [] as [Value; 0]);
        // Steps of a protocol are all sent.
        for number in 0..3 {
            events.emit_at("FREE_PAGE_HINT", json!(number), third);
        }
        assert_eq!(data(&lines).len(), 3);
    }

    #[test]
    fn the_end_of_a_subscription_ends_its_events() {
        let (events, lines) = (Arc::new(Events::default()), Arc::new(Lines::default()));
        drop(events.subscribe(lines.clone()));
        events.emit("FREE_PAGE_HINT", json!({}));
        assert_eq!(lines.take().len(), 0);
    }
}

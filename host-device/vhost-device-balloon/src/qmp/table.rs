// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of connected clients: who has a place, and who loses it when the table is full.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::outbox::Outbox;
use super::protocol::QmpSession;
use crate::sync::lock;

/// The most clients that are connected at the same time.
pub(super) const MAX_CLIENTS: usize = 16;

/// A connected client, as its thread and the table see it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) outbox: Arc<Outbox>,
    /// The process that has connected, if it is known.
    process: Option<i32>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    negotiated: bool,
    /// The time of the connection, or of the last command.
    active: Instant,
    /// Why the thread must end, if it must.
    closing: Option<String>,
}

impl Entry {
    pub(super) fn new(outbox: Outbox, process: Option<i32>, now: Instant) -> Self {
        Self {
            outbox: Arc::new(outbox),
            process,
            state: Mutex::new(State {
                negotiated: false,
                active: now,
                closing: None,
            }),
        }
    }

    /// Notes that the client has sent a command.
    pub(super) fn set_active(&self, session: &QmpSession<'_>) {
        let mut state = lock(&self.state);
        state.active = Instant::now();
        state.negotiated = session.is_negotiated();
    }

    /// Returns why the thread must end, if it must.
    pub(super) fn closing(&self) -> Option<String> {
        lock(&self.state).closing.clone()
    }

    /// Tells the thread to end.
    pub(super) fn close(&self, why: &str) {
        lock(&self.state)
            .closing
            .get_or_insert_with(|| why.to_owned());
        self.outbox.wake();
    }
}

/// The connected clients, by number. A client is in the table as long as its thread exists.
#[derive(Debug, Default)]
pub(super) struct Table(BTreeMap<u64, Arc<Entry>>);

impl Table {
    /// Returns the number of clients.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds a client.
    pub(super) fn insert(&mut self, number: u64, entry: Arc<Entry>) {
        self.0.insert(number, entry);
    }

    /// Removes a client whose thread ends.
    pub(super) fn remove(&mut self, number: u64) {
        self.0.remove(&number);
    }

    /// Returns all clients.
    pub(super) fn clients(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.0.values()
    }

    /// Makes room for another client if the table is full. Returns whether there is room.
    ///
    /// A client that has not sent `qmp_capabilities` loses its place first: the one that connected first. The others
    /// lose it only after `idle` without a command: first one of the process with the most connections, and of these
    /// the one that has been idle for the longest. A monitor that only waits for events therefore keeps its place,
    /// unless all places are wanted by others. The number of threads that have not ended yet is limited as well.
    pub(super) fn make_room(&self, now: Instant, idle: Duration) -> bool {
        let open: Vec<_> = self
            .clients()
            .filter(|entry| lock(&entry.state).closing.is_none())
            .collect();
        if open.len() < MAX_CLIENTS {
            return self.len() < 2 * MAX_CLIENTS;
        }
        if self.len() >= 2 * MAX_CLIENTS {
            return false;
        }
        let connections = |process: Option<i32>| {
            let same = open.iter().filter(|entry| entry.process == process);
            process.map_or(1, |_| same.count())
        };
        let victim = open
            .iter()
            .filter_map(|entry| {
                let state = lock(&entry.state);
                let quiet = now.saturating_duration_since(state.active);
                let evictable = !state.negotiated || quiet >= idle;
                evictable.then(|| (!state.negotiated, connections(entry.process), quiet, *entry))
            })
            .max_by_key(|(negotiates, connections, quiet, _)| match negotiates {
                true => (true, 0, *quiet),
                false => (false, *connections, *quiet),
            });
        match victim {
            Some((_, _, _, entry)) => {
                entry.close("client was idle, and another one needs its place");
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_secs(60);

    struct Clients {
        table: Table,
        start: Instant,
    }

    impl Clients {
        fn new() -> Self {
            Self {
                table: Table::default(),
                start: Instant::now(),
            }
        }

        /// Adds a client of `process` that was active after so many seconds.
        fn add(&mut self, process: i32, negotiated: bool, active: u64) -> Arc<Entry> {
            let active = self.start + Duration::from_secs(active);
            let entry = Entry::new(Outbox::new().unwrap(), Some(process), active);
            lock(&entry.state).negotiated = negotiated;
            let entry = Arc::new(entry);
            self.table.insert(self.table.len() as u64, entry.clone());
            entry
        }

        fn make_room(&self, seconds: u64) -> bool {
            let now = self.start + Duration::from_secs(seconds);
            self.table.make_room(now, IDLE)
        }
    }

    #[test]
    fn silent_clients_without_negotiation_keep_nobody_out() {
        let mut clients = Clients::new();
        let monitor = clients.add(1, true, 0);
        let silent: Vec<_> = (1..16)
            .map(|second| clients.add(2, false, second))
            .collect();
        assert!(clients.make_room(1000));
        let closing: Vec<_> = silent.iter().map(|it| it.closing().is_some()).collect();
        assert_eq!(closing.iter().filter(|it| **it).count(), 1);
        assert!(closing[0], "the one that connected first");
        assert_eq!(monitor.closing(), None);
    }

    #[test]
    fn a_monitor_keeps_its_place_beside_a_process_that_takes_all_others() {
        let mut clients = Clients::new();
        let monitor = clients.add(1, true, 0);
        let hoarded: Vec<_> = (0..15).map(|_| clients.add(2, true, 5)).collect();
        // None has been idle for long enough.
        assert!(!clients.make_room(59));
        assert!(clients.make_room(65));
        assert_eq!(monitor.closing(), None);
        let closing = hoarded.iter().filter(|it| it.closing().is_some());
        assert_eq!(closing.count(), 1);
    }

    #[test]
    fn threads_that_do_not_end_are_counted() {
        let mut clients = Clients::new();
        for _ in 0..16 {
            clients.add(1, false, 0);
        }
        let mut added = 0;
        while clients.make_room(0) {
            clients.add(1, false, 0);
            added += 1;
            assert!(added <= 16);
        }
        assert_eq!(clients.table.len(), 32);
    }
}

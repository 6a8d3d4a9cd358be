// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the time limits of clients, over real sockets.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{CommandContext, QmpClients, QmpLimits};
use crate::device::Device;
use crate::device_lock::DeviceLock;
use crate::events::Events;
use crate::migrate::MigrationManager;

const HANG_TIMEOUT: Duration = Duration::from_secs(600);

const NEVER: QmpLimits = QmpLimits {
    negotiation: HANG_TIMEOUT,
    unread: HANG_TIMEOUT,
    closing: HANG_TIMEOUT,
    idle: HANG_TIMEOUT,
};

const NEGOTIATE: &[u8] = b"{\"execute\":\"qmp_capabilities\"}";

fn clients(limits: QmpLimits) -> QmpClients {
    let events = Arc::new(Events::default());
    let device = Device::new(Default::default(), events.clone());
    let device = Arc::new(DeviceLock::new(device));
    let context = CommandContext {
        migration_manager: Arc::new(MigrationManager::new(device.clone(), events.clone(), || {})),
        device,
        events,
        save_state: Box::new(|state, path| state.write(path)),
        quit: Box::new(|| {}),
    };
    QmpClients::with_limits(context, limits)
}

fn connect(clients: &mut QmpClients) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
    theirs.set_write_timeout(Some(HANG_TIMEOUT)).unwrap();
    clients.serve(ours);
    theirs
}

#[test]
fn a_client_that_has_no_place_any_more_has_no_descriptors_either() {
    for _ in 0..500 {
        let mut clients = clients(NEVER);
        let mut client = connect(&mut clients);
        clients.close();
        // The greeting, and then the end.
        client.set_nonblocking(true).unwrap();
        let read = client.read_to_end(&mut Vec::new());
        assert!(read.is_ok(), "the connection is open: {read:?}");
    }
}

fn until_empty(clients: &QmpClients) {
    let limit = Instant::now() + HANG_TIMEOUT;
    while clients.count() > 0 {
        assert!(Instant::now() < limit, "a client has a place for ever");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_client_that_does_not_read_is_disconnected() {
    let unread = Duration::ZERO;
    let mut clients = clients(QmpLimits { unread, ..NEVER });
    let mut client = connect(&mut clients);
    client.write_all(NEGOTIATE).unwrap();
    // The end shows as an error of a write.
    loop {
        match client.write_all(b"{\"execute\":\"query-commands\"}") {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error}"),
        }
    }
    until_empty(&clients);
    clients.close();
}

#[test]
fn a_client_that_closes_its_side_and_does_not_read_keeps_its_place_until_it_is_disconnected() {
    let mut clients = clients(NEVER);
    let mut client = connect(&mut clients);
    client.write_all(NEGOTIATE).unwrap();
    client.set_nonblocking(true).unwrap();
    while client
        .write_all(b"{\"execute\":\"query-commands\"}")
        .is_ok()
    {}
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(clients.count(), 1);
    // It reads at last, and its thread ends.
    client.set_nonblocking(false).unwrap();
    let mut answers = Vec::new();
    client.read_to_end(&mut answers).unwrap();
    until_empty(&clients);
    clients.close();
}

#[test]
fn a_client_that_does_not_negotiate_is_disconnected() {
    let negotiation = Duration::ZERO;
    let mut clients = clients(QmpLimits {
        negotiation,
        ..NEVER
    });
    let client = connect(&mut clients);
    let mut lines = BufReader::new(client).lines();
    let greeting: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert!(greeting.get("QMP").is_some());
    assert!(lines.next().is_none());
    until_empty(&clients);
    clients.close();
}

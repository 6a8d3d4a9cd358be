// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A panic of a thread, in a process of its own: the hook for panics and the log belong to the whole process.

use std::process::Command;
use std::thread;

use shared_abi::features::Features;
use tracing::level_filters::LevelFilter;
use vhost_device_balloon::log::Log;
use vhost_device_balloon::panics::end_server_on_panic;
use vhost_device_balloon::server::{Server, ServerError, ServerOptions};
use vhost_device_balloon::vring::NotificationSuppression;

/// Set in the process that panics.
const CHILD: &str = "VHOST_DEVICE_BALLOON_TEST_PANIC";

#[test]
fn a_panic_of_a_thread_ends_the_daemon_with_a_message() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_process_that_panics", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} {log}", output.status);
    assert!(
        log.contains("ERROR thread vring_worker panicked at"),
        "{log}"
    );
    assert!(log.contains("out of order"), "{log}");
}

/// Does nothing unless the test above starts it.
#[test]
fn the_process_that_panics() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let log = Log::start(LevelFilter::INFO).unwrap();
    let server = Server::bind(ServerOptions {
        socket_path: directory.path().join("vhost"),
        qmp_socket: None,
        features: Features::NONE,
        suppression: NotificationSuppression::default(),
        inhibit_discard: false,
        persistent: true,
        device_state: None,
    })
    .unwrap();
    end_server_on_panic(server.shutdown_handle().unwrap());
    let thread = thread::Builder::new()
        .name("vring_worker".into())
        .spawn(|| panic!("out of order"));
    let result = server.run();
    assert!(
        matches!(result, Err(ServerError::ThreadPanicked)),
        "{result:?}"
    );
    assert!(thread.unwrap().join().is_err());
    assert!(directory.path().read_dir().unwrap().next().is_none());
    drop(log);
}

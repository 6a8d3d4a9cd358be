// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which connection becomes the front end, and which is refused. A balloon serves one guest at a time.

use std::io::Write;
use std::os::unix::net::UnixStream;

use rustix::net::RecvFlags;
use tracing::{debug, info, warn};

use super::{Server, ServerError, SESSION_ENDED};
use crate::session::Session;

/// The most connections that have sent nothing yet.
const MAX_PENDING_CONNECTIONS: usize = 8;

impl Server {
    /// Handles a new connection. It becomes the front end once it sends something and no other front end is connected.
    /// A connection that sends nothing only checks whether the server runs.
    pub(super) fn add_pending_connection(&mut self, stream: UnixStream) {
        if self.is_busy() || self.pending_connections.len() >= MAX_PENDING_CONNECTIONS {
            self.refuse();
        } else {
            self.pending_connections.push(stream);
        }
    }

    /// Returns whether there is a guest already: its front end is connected, or its migration has not ended. Also true
    /// while the program waits for QMP clients before it ends.
    fn is_busy(&self) -> bool {
        self.session.is_some()
            || self.exit_deadline.is_some()
            || self.migration_manager.is_in_progress()
    }

    fn refuse(&self) {
        if self.session.is_none() {
            warn!(
                "front end refused at {}: the daemon is busy with the migration of the previous guest, or with other connections; try again later",
                self.options.socket_path.display()
            );
            return;
        }
        warn!(
            "second front end refused at {}: one is already connected; start another vhost-device-balloon \
             with its own socket",
            self.options.socket_path.display()
        );
    }

    /// Makes the first pending connection that has sent something the front end.
    pub(super) fn check_pending_connections(&mut self) -> Result<(), ServerError> {
        for stream in std::mem::take(&mut self.pending_connections) {
            let mut byte = [0u8];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            match rustix::net::recv(&stream, &mut byte, flags) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    self.pending_connections.push(stream)
                }
                Ok((_, 1..)) if !self.is_busy() => self.serve_front_end(stream)?,
                Ok((_, 1..)) => self.refuse(),
                Ok(_) | Err(_) => debug!("vhost-user: a connection closed without sending data"),
            }
        }
        Ok(())
    }

    fn serve_front_end(&mut self, stream: UnixStream) -> Result<(), ServerError> {
        stream.set_nonblocking(false)?;
        info!("front end connected");
        let wake = self.wake.1.try_clone()?;
        self.session = Some(Session::start(stream, self.device.clone(), move || {
            let _ = (&wake).write(&[SESSION_ENDED]);
        })?);
        Ok(())
    }
}

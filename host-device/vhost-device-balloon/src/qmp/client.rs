// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two threads of a client: one reads and executes its commands, the other writes answers and events.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender};

use tracing::debug;

use super::context::CommandContext;
use super::frames::{FrameError, Frames};
use super::protocol::{self, QmpSession};

/// Executes the commands of a client until it disconnects. Returns why it was disconnected.
pub(super) fn serve_client(
    stream: &UnixStream,
    lines: SyncSender<String>,
    context: &CommandContext,
) -> String {
    let mut session = QmpSession::new(context);
    if lines.send(protocol::greeting()).is_err() {
        return "client does not read its answers".into();
    }
    let mut frames = Frames::new(stream);
    loop {
        let (answer, over) = match frames.next() {
            Ok(None) => return "client closed the connection".into(),
            Ok(Some(frame)) => (session.answer(&frame, &lines), None),
            Err(FrameError::Garbage) => {
                let text = "JSON parse error, expecting an object";
                (protocol::error(None, "GenericError", text), None)
            }
            Err(error @ FrameError::TooLong) => {
                let text = error.to_string();
                (protocol::error(None, "GenericError", &text), Some(text))
            }
            Err(FrameError::Io(error)) => return error.to_string(),
        };
        if lines.send(answer).is_err() {
            return "client does not read its answers".into();
        }
        if let Some(why) = over {
            return why;
        }
        if session.quit_requested() {
            (context.quit)();
        }
    }
}

pub(super) fn write(mut stream: UnixStream, lines: &Receiver<String>) {
    for line in lines {
        if let Err(error) = stream.write_all(format!("{line}\r\n").as_bytes()) {
            debug!("write to a QMP client failed: {error}");
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

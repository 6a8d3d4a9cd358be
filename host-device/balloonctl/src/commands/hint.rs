// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `hint`: hint rounds under manual control.

use qmp_client::Client;
use serde_json::{json, Value};

use crate::args::Hint;
use crate::error::CommandError;
use crate::output::Output;
use crate::size;

/// Executes the command.
pub fn run(daemon: &mut Client, what: Hint, output: &mut Output) -> Result<(), CommandError> {
    let command = match what {
        Hint::Start => "free-page-hint-start",
        Hint::Stop => "free-page-hint-stop",
        Hint::Done => "free-page-hint-done",
        Hint::Status => "query-free-page-hint",
    };
    // The daemon executes `stop` and `done` without a guest as well, for its next one.
    let later = match what {
        Hint::Stop | Hint::Done => guest_reads_later(daemon)?,
        Hint::Start | Hint::Status => "",
    };
    let answer = daemon.command(command, json!({}))?;
    let text = match what {
        Hint::Start => format!("hint round started, id {}", id(&answer)),
        Hint::Stop => format!("hint round stopped; the guest keeps its hinted blocks{later}"),
        Hint::Done => format!("hint round done; the guest releases its hinted blocks{later}"),
        Hint::Status => line(&answer),
    };
    output.print_result(&answer, &text)
}

/// Returns when the guest reads a command if it does not read it now.
///
/// # Errors
///
/// If there is no guest.
fn guest_reads_later(daemon: &mut Client) -> Result<&'static str, CommandError> {
    let virtio = daemon.command("query-virtio-status", json!({}))?;
    let status = virtio.get("status").and_then(Value::as_str);
    match status {
        Some("no-front-end") => Err(CommandError::Failed(
            "no VMM is connected: start the VMM with the daemon's --socket-path".into(),
        )),
        Some("no-driver") => Ok(" once its driver runs"),
        _ => Ok(""),
    }
}

fn id(answer: &Value) -> String {
    let id = answer.get("id").and_then(Value::as_u64);
    id.map_or_else(|| "unknown".to_owned(), |id| format!("{id:#x}"))
}

/// Returns an answer of `query-free-page-hint` as one line.
pub fn line(answer: &Value) -> String {
    let number = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or_default();
    let status = answer.get("status").and_then(Value::as_str);
    let mut text = status.unwrap_or("unknown").to_owned();
    if answer.get("id").is_some() {
        text = format!("{text}, id {}", id(answer));
    }
    if number("blocks") > 0 {
        let (blocks, bytes) = (number("blocks"), size::show(number("bytes")));
        let (cleared, total) = (number("pages-cleared"), number("pages-total"));
        text = format!("{text}, {blocks} hinted blocks, {bytes}");
        // After a migration, the dirty bitmap is gone.
        if total > 0 {
            text = format!("{text}: {cleared} of {total} pages can be skipped");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_round_is_shown_in_one_line() {
        assert_eq!(
            line(&json!({ "status": "stopped", "blocks": 0 })),
            "stopped"
        );
        let answer = json!({
            "status": "finished", "id": 0x8000_0001_u32, "blocks": 2, "bytes": 8 << 20,
            "pages-cleared": 2048, "pages-total": 131_072,
        });
        assert_eq!(
            line(&answer),
            "finished, id 0x80000001, 2 hinted blocks, 8.00 MiB: 2048 of 131072 pages can be skipped"
        );
        let answer = json!({
            "status": "done", "blocks": 2, "bytes": 8 << 20, "pages-cleared": 0, "pages-total": 0,
        });
        assert_eq!(line(&answer), "done, 2 hinted blocks, 8.00 MiB");
    }
}

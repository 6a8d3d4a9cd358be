// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `discard`: whether the daemon releases the guest's memory to the host.

use qmp_client::Client;
use serde_json::{json, Value};

use crate::args::Discard;
use crate::error::CommandError;
use crate::output::Output;

/// Executes the command.
pub fn run(daemon: &mut Client, what: Discard, output: &mut Output) -> Result<(), CommandError> {
    let command = match what {
        Discard::Inhibit => "inhibit-discard",
        Discard::Allow => "allow-discard",
        Discard::Status => "query-balloon",
    };
    let answer = daemon.command(command, json!({}))?;
    let text = match what {
        Discard::Inhibit => "no memory is released to the host until `discard allow`".to_owned(),
        Discard::Allow => "memory is released to the host, unless a device pins it".to_owned(),
        Discard::Status => line(&answer),
    };
    output.print_result(&answer, &text)
}

/// Returns what an answer of `query-balloon` says about discarding, as one line.
pub fn line(balloon: &Value) -> String {
    let reasons = balloon
        .get("discard-inhibited-by")
        .and_then(Value::as_array);
    let reasons: Vec<&str> = reasons
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    match balloon.get("discard-inhibited").and_then(Value::as_bool) {
        Some(true) => format!("inhibited: {}", reasons.join("; ")),
        Some(false) => "allowed".to_owned(),
        None => "unknown: the daemon is too old to say".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_inhibits_discarding_is_named() {
        let inhibited =
            json!({ "discard-inhibited": true, "discard-inhibited-by": ["VFIO", "a user"] });
        assert_eq!(line(&inhibited), "inhibited: VFIO; a user");
        let allowed = json!({ "discard-inhibited": false, "discard-inhibited-by": [] });
        assert_eq!(line(&allowed), "allowed");
        assert!(line(&json!({ "actual": 1 })).starts_with("unknown"));
    }
}

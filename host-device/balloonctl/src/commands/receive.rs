// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `receive`: the destination of `migrate`.

use std::path::Path;
use std::thread;
use std::time::Duration;

use guest_migration::stream::{
    Address, Destination, Listener, ReceivePhase, ReceiveProgress, Received, Receiver,
    ReceiverOptions, StreamError,
};
use guest_migration::{CancelToken, PAGE_SIZE};
use serde_json::{json, Value};

use crate::args::Receive;
use crate::error::CommandError;
use crate::interrupt::Interrupts;
use crate::output::{fields, Output};
use crate::size;

/// Interval between two checks of the progress.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Receives memory, and shows the progress. An interrupt cancels it.
pub fn run(
    options: &Receive,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), CommandError> {
    let address: Address = options
        .listen
        .parse()
        .map_err(|error| CommandError::Usage(format!("--listen {}: {error}", options.listen)))?;
    let inherited = address.check_inherited();
    inherited.map_err(|error| CommandError::Usage(format!("--listen: {error}")))?;
    let destination = destination(&options.memory_file)?;
    let cancel = CancelToken::default();
    let failed = |error: StreamError| CommandError::Failed(error.to_string());
    let listener = Listener::bind(&address).map_err(failed)?;
    let receiver_options = ReceiverOptions {
        cancel: cancel.clone(),
        ..ReceiverOptions::default()
    };
    let receiver = Receiver::new(listener, destination, receiver_options).map_err(failed)?;
    output.say(&format!("listening on {}", receiver.address()));
    let progress = receiver.progress();
    let receiving = thread::spawn(move || receiver.run());
    while !receiving.is_finished() {
        if interrupts.count() > 0 {
            cancel.cancel();
        }
        if progress.phase() != ReceivePhase::Waiting {
            output.show_progress(&line(&progress));
        }
        thread::sleep(POLL_INTERVAL);
    }
    let received = receiving
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    match received {
        Ok(received) => output.print_result(&value(&received), &report(&received)),
        Err(error) => Err(incomplete(options, &error)),
    }
}

/// Returns the destination of the RAM blocks: `PATH` for the only one, or `NAME=PATH` for each.
fn destination(files: &[String]) -> Result<Destination, CommandError> {
    if let [file] = files {
        if !file.contains('=') {
            return Ok(Destination::with_file(file));
        }
    }
    let mut destination = Destination::new();
    for file in files {
        let (name, path) = file.split_once('=').ok_or_else(|| {
            CommandError::Usage(format!(
                "--memory-file {file}: several files need the names of their RAM blocks, as in ram0={file}"
            ))
        })?;
        destination = destination.with_ram_block(name, path);
    }
    Ok(destination)
}

fn incomplete(options: &Receive, error: &StreamError) -> CommandError {
    let paths = options.memory_file.iter().map(|file| {
        let (_, path) = file.split_once('=').unwrap_or(("", file));
        Destination::marker(Path::new(path)).display().to_string()
    });
    let markers: Vec<String> = paths.collect();
    let message = format!(
        "{error}; received memory is incomplete: do not start a guest from it (see {})",
        markers.join(", ")
    );
    match error {
        StreamError::Cancelled => CommandError::Cancelled(message),
        _ => CommandError::Incomplete(message),
    }
}

fn line(progress: &ReceiveProgress) -> String {
    let doing = match progress.phase() {
        ReceivePhase::Waiting => "waiting",
        ReceivePhase::Receiving => "receiving",
        ReceivePhase::Checking => "checking",
        ReceivePhase::Ended => "ended",
    };
    format!(
        "{doing}, iteration {}, {} received, {} pages with content, {} zero pages, total memory {}",
        progress.iterations().saturating_add(1),
        size::show(progress.bytes()),
        progress.pages(),
        progress.zeros(),
        size::show(progress.total().saturating_mul(PAGE_SIZE)),
    )
}

fn value(received: &Received) -> Value {
    let blocks: Vec<Value> = received
        .blocks
        .iter()
        .map(|(name, pages, path)| json!({ "name": name, "pages": pages, "file": path }))
        .collect();
    json!({
        "transferred": received.bytes,
        "normal": received.pages,
        "duplicate": received.zeros,
        "rounds": received.iterations,
        "channels": received.channels,
        "content-checked": received.content_checked,
        "blocks": blocks,
    })
}

fn report(received: &Received) -> String {
    let pages = |count: u64| {
        let bytes = count.saturating_mul(PAGE_SIZE);
        format!("{count} ({})", size::show(bytes))
    };
    let mut lines = vec![
        ("status", "completed".to_owned()),
        ("received", size::show(received.bytes)),
        ("pages with content", pages(received.pages)),
        ("zero pages", pages(received.zeros)),
        ("iterations", received.iterations.to_string()),
        ("channels", received.channels.to_string()),
        (
            "content digest compared",
            if received.content_checked {
                "yes"
            } else {
                "no: the sender sent none"
            }
            .to_owned(),
        ),
    ];
    for (name, count, path) in &received.blocks {
        lines.push((
            "memory",
            format!("{name}: {} in {}", pages(*count), path.display()),
        ));
    }
    fields(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_files_need_names() {
        let files = |files: &[&str]| {
            let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
            destination(&files)
        };
        for right in [&["/a"][..], &["ram=/a"], &["x=/a", "y=/b"]] {
            files(right).unwrap();
        }
        let error = files(&["x=/a", "/b"]).unwrap_err();
        assert_eq!(error.exit_status(), 2);
        assert!(error.to_string().contains("/b"), "{error}");
    }
}

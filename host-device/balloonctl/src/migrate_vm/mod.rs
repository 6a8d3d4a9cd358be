// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Moves a whole guest from one stock QEMU to another while it runs.
//!
//! Our daemon moves memory, QEMU the state of its devices. QEMU cannot migrate a guest that has a generic vhost-user
//! device, so the balloon is unplugged for the last moment, and a fresh daemon's is plugged in at the destination.
//!
//! A [`survey`] looks whether all is as it must be and changes nothing; a [`plan`] is every command that will be given,
//! which `--dry-run` prints; [`perform`] gives them, and takes back what was done if one fails before the destination runs.

mod perform;
mod plan;
mod survey;
mod undo;
mod world;

pub use perform::{perform, Done, Moved};
pub use plan::{capability, plan, Order, Side, Step, Until, PAUSE};
pub use survey::{survey, Survey};
pub use undo::Undo;
pub use world::World;

use qmp_client::Client;
use serde_json::json;

use crate::args::MigrateVm;
use crate::commands::progress;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::output::{table, Output};

/// Moves a guest, or says what it would do.
///
/// # Errors
///
/// See [`Failure`].
pub fn run(
    daemon: Client,
    options: &MigrateVm,
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut world = World {
        source: Client::connect(&options.source_qmp)?,
        destination: Client::connect(&options.destination_qmp)?,
        daemon,
    };
    let survey = survey(&mut world, options)?;
    // Private, and gone when this is.
    let folder = tempfile::Builder::new().prefix("balloonctl-").tempdir();
    let folder = folder.map_err(|error| Failure::Io("cannot make a folder".into(), error))?;
    let default = format!("file:{}", folder.path().join("vm-state").display());
    let vm_state = options.vm_state.as_deref().unwrap_or(&default);
    let steps = plan(options, &survey, vm_state);
    if options.dry_run {
        return output.result(&json!({ "steps": steps }), &plan::describe(&steps));
    }
    let moved = perform(&mut world, &survey, &steps, interrupts, output)?;
    output.result(&moved, &report(&moved))
}

fn report(moved: &Moved) -> String {
    let head = ["step", "where", "ms"].map(str::to_owned).to_vec();
    let mut rows = vec![head];
    for done in &moved.steps {
        rows.push(vec![
            done.what.clone(),
            done.side.name().to_owned(),
            done.ms.to_string(),
        ]);
    }
    format!(
        "{}\n{}\nthe guest runs at the destination; it stood still for {} ms",
        table(&rows),
        progress::report(&moved.memory),
        moved.downtime_ms
    )
}

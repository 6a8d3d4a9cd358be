// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Does what was planned.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use migration::status::Status;
use qmp_client::Error;
use rustix::process::{kill_process_group, Pid, Signal};
use serde::Serialize;
use serde_json::Value;

use super::plan::{Side, Step, Until};
use super::survey::Survey;
use super::undo;
use super::world::{wait, RunState, VmState, World, LOOK_EVERY};
use crate::commands::progress;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::output::Output;

/// A step that was done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Done {
    /// By whom.
    pub side: Side,
    /// What it was for.
    pub what: String,
    /// How long it took, in milliseconds.
    pub ms: u64,
}

/// A guest that was moved.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Moved {
    /// What was done.
    pub steps: Vec<Done>,
    /// How the guest's memory was moved.
    pub memory: Status,
    /// How long the guest stood still, in milliseconds.
    pub downtime_ms: u64,
}

/// A plan that is being carried out.
pub(super) struct Running<'a> {
    pub world: &'a mut World,
    pub survey: &'a Survey,
    interrupts: &'a Interrupts,
    output: &'a mut Output,
    memory: Status,
    shell: Option<Child>,
}

/// Carries out a plan.
///
/// # Errors
///
/// What went wrong, and what was undone: then the guest runs at the source. [`Failure::Stranded`] if that is not so, or not
/// known.
pub fn perform(
    world: &mut World,
    survey: &Survey,
    steps: &[Step],
    interrupts: &Interrupts,
    output: &mut Output,
) -> Result<Moved, Failure> {
    let mut running = Running {
        world,
        survey,
        interrupts,
        output,
        memory: Status::default(),
        shell: None,
    };
    let (mut begun, mut done) = (Vec::new(), Vec::new());
    let (mut stopped, mut downtime) = (None, Duration::ZERO);
    let mut committed = false;
    for (step, number) in steps.iter().zip(1usize..) {
        let (side, count) = (step.side.name(), steps.len());
        let name = format!("{number}/{count} {side}: {}", step.what);
        running.output.say(&name);
        begun.extend(step.undo.clone());
        let then = Instant::now();
        if step.until == Until::Running(false) {
            stopped = Some(then);
        }
        if let Err(failure) = running.step(step) {
            if committed {
                return Err(Failure::Stranded(format!(
                    "the guest runs at the destination, but: {name}: {}",
                    failure.story()
                )));
            }
            if step.commits && !is_harmless(&failure) {
                return Err(Failure::Stranded(format!(
                    "{name}: {}; it is not known whether the guest runs at the destination, so the source stays paused. If \
                     it does not run there, 'cont' lets it go on here",
                    failure.story()
                )));
            }
            running
                .output
                .say(&format!("{}; going back", failure.story()));
            return Err(running.back(&name, failure, &begun));
        }
        committed |= step.commits;
        if step.commits {
            downtime = stopped.map_or(Duration::ZERO, |stopped| stopped.elapsed());
        }
        done.push(Done {
            side: step.side,
            what: step.what.clone(),
            ms: millis(then.elapsed()),
        });
    }
    Ok(Moved {
        steps: done,
        memory: running.memory,
        downtime_ms: millis(downtime),
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Whether a command that failed so was certainly not done: an interrupt is looked for before a command is given.
fn is_harmless(failure: &Failure) -> bool {
    matches!(
        failure,
        Failure::Qmp(Error::Refused { .. }) | Failure::Cancelled(_)
    )
}

impl Running<'_> {
    fn step(&mut self, step: &Step) -> Result<(), Failure> {
        if self.interrupts.count() > 0 {
            return Err(Failure::Cancelled("interrupted".into()));
        }
        let answer = match (&step.order, self.world.of(step.side)) {
            (Some(order), Some(client)) => {
                // What was told before is not about this.
                client.forget_events();
                client.command(&order.execute, order.arguments.clone())?
            }
            _ => Value::Null,
        };
        let limit = step.limit.unwrap_or(Duration::MAX);
        match &step.until {
            Until::Answered => Ok(()),
            Until::Written(path) => write(path, &answer),
            Until::Unplugged(id) => self.unplugged(id, limit),
            Until::Running(wanted) => self.runs(step.side, *wanted, limit),
            Until::Memory(state) => {
                let (daemon, output) = (&mut self.world.daemon, &mut *self.output);
                self.memory = progress::watch(daemon, Some(*state), self.interrupts, output)?;
                if self.memory.status == *state {
                    Ok(())
                } else {
                    progress::verdict(&self.memory)
                }
            }
            Until::VmState => self.vm_state(step.side, limit),
            Until::Listening { socket, shell } => self.listening(socket, shell.as_deref(), limit),
        }
    }

    fn unplugged(&mut self, id: &str, limit: Duration) -> Result<(), Failure> {
        let (source, interrupts) = (&mut self.world.source, self.interrupts);
        let what = format!("the guest did not let '{id}' go");
        wait(&what, limit, Some(interrupts), || {
            let told = |name: &str| name == "DEVICE_DELETED" || name == "DEVICE_UNPLUG_GUEST_ERROR";
            let event = source.wait_event(
                |event| told(&event.name) && event.text("device") == id,
                LOOK_EVERY,
            )?;
            match event {
                Some(event) if event.name == "DEVICE_DELETED" => Ok(Some(())),
                Some(_) => Err(Failure::Failed(format!("the guest keeps '{id}'"))),
                None => Ok(None),
            }
        })
    }

    fn runs(&mut self, side: Side, wanted: bool, limit: Duration) -> Result<(), Failure> {
        let Some(client) = self.world.of(side) else {
            return Ok(());
        };
        let word = if wanted { "run" } else { "stop" };
        let what = format!("the guest at the {} did not {word}", side.name());
        wait(&what, limit, None, || {
            let state: RunState = client.query("query-status")?;
            Ok((state.running == wanted).then_some(()))
        })
    }

    fn vm_state(&mut self, side: Side, limit: Duration) -> Result<(), Failure> {
        let interrupts = self.interrupts;
        let Some(client) = self.world.of(side) else {
            return Ok(());
        };
        let what = format!("the {} did not move the state of its devices", side.name());
        wait(&what, limit, Some(interrupts), || {
            let state: VmState = client.query("query-migrate")?;
            match state.status.as_str() {
                "completed" => Ok(Some(())),
                "failed" | "cancelled" => Err(Failure::Failed(format!(
                    "the state of QEMU's devices was not moved: {}: {}",
                    state.status,
                    state
                        .error_desc
                        .unwrap_or_else(|| "QEMU does not say why".into())
                ))),
                _ => Ok(None),
            }
        })
    }

    fn listening(
        &mut self,
        socket: &Path,
        shell: Option<&str>,
        limit: Duration,
    ) -> Result<(), Failure> {
        if let Some(command) = shell {
            // In a group of its own, so that Ctrl-C is for us alone.
            let child = Command::new("/bin/sh")
                .args(["-c", command])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .process_group(0)
                .spawn();
            let failed = |error| Failure::Io(format!("cannot run '{command}'"), error);
            self.shell = Some(child.map_err(failed)?);
        }
        let what = format!("nobody listened at {}", socket.display());
        let mut child = self.shell.as_mut();
        wait(&what, limit, Some(self.interrupts), || {
            if socket.exists() {
                return Ok(Some(()));
            }
            let ended = child.as_mut().and_then(|child| child.try_wait().ok());
            match ended.flatten() {
                // A command may put its daemon into the background.
                Some(status) if !status.success() => Err(Failure::Failed(format!(
                    "the command that was to start the destination's daemon ended: {status}"
                ))),
                _ => Ok(None),
            }
        })
    }

    /// Ends what was started here.
    pub(super) fn end_shell(&mut self) -> Option<String> {
        let mut child = self.shell.take()?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw)?;
        // It may have ended by itself.
        let _ = kill_process_group(group, Signal::TERM);
        let _ = child.wait();
        Some("the destination's daemon is ended".into())
    }

    fn back(&mut self, name: &str, failure: Failure, begun: &[undo::Undo]) -> Failure {
        let (done, failed) = undo::undo(self, begun);
        let mut story = format!("{name}: {}", failure.story());
        for what in done {
            story = format!("{story}; {what}");
        }
        if !failed.is_empty() {
            return Failure::Stranded(format!(
                "{story}; what could not be undone: {}",
                failed.join("; ")
            ));
        }
        story = format!("{story}; the destination waits as it is, and may be ended");
        match failure {
            Failure::Cancelled(_) => Failure::Cancelled(story),
            Failure::TimedOut(_) => Failure::TimedOut(story),
            _ => Failure::Failed(story),
        }
    }
}

/// Writes a file whole, or not at all.
fn write(path: &Path, value: &Value) -> Result<(), Failure> {
    let failed = |error| Failure::Io(format!("cannot write {}", path.display()), error);
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    writeln!(file, "{value:#}").map_err(failed)?;
    fs::File::sync_all(file.as_file()).map_err(failed)?;
    let persisted = file.persist(path);
    persisted.map(drop).map_err(|error| failed(error.error))
}

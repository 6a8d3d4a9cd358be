// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as the helper process sees it: a source of hints, and a process to quiesce.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use guest_migration::dirty_tracking::{PunchedPages, Quiesce};
use guest_migration::{CancelToken, HintSource, HintSourceError, HintWindow, WaitOutcome};
use qmp_client::{JsonLines, LineError};
use serde::Serialize;

use super::messages::{FromHelper, Request, ToHelper, TIMEOUT};
use crate::sync::lock;

/// The hint window, while the device has it.
#[derive(Default)]
struct Window {
    open: Option<HintWindow>,
    /// How the hint round has ended.
    ended: Option<WaitOutcome>,
}

/// The connection to the device process. A thread reads it, and applies hints at once.
pub(super) struct RemoteDevice {
    lines: Mutex<JsonLines>,
    /// The answers to requests. Held from a request to its answer.
    answers: Mutex<Receiver<Result<(), String>>>,
    window: Mutex<Window>,
    /// Notified when the hint round ends, and when the migration is cancelled.
    changed: Condvar,
    punched: PunchedPages,
    cancel: CancelToken,
    /// The pid of the device process.
    process: u32,
}

impl RemoteDevice {
    /// Starts to read `lines`, a connection whose socket is `stream` too. The loss of the connection cancels the migration.
    ///
    /// # Errors
    ///
    /// If the host reports an error.
    pub(super) fn start(
        lines: JsonLines,
        stream: &UnixStream,
        punched: PunchedPages,
        cancel: &CancelToken,
        process: u32,
    ) -> io::Result<Arc<Self>> {
        let (sender, answers) = channel();
        let output = JsonLines::new(stream.try_clone()?, "device process");
        let device = Arc::new(Self {
            lines: Mutex::new(output.with_write_timeout(TIMEOUT)),
            answers: Mutex::new(answers),
            window: Mutex::default(),
            changed: Condvar::new(),
            punched,
            cancel: cancel.clone(),
            process,
        });
        let woken = Arc::downgrade(&device);
        cancel.on_cancel(move || {
            if let Some(device) = woken.upgrade() {
                // With the lock, so that a waiter does not miss it between its check and its wait.
                drop(lock(&device.window));
                device.changed.notify_all();
            }
        });
        let reader = device.clone();
        thread::Builder::new()
            .name("device".into())
            .spawn(move || reader.read(lines, &sender))?;
        Ok(device)
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// If the device process has ended.
    pub(super) fn send(&self, message: &impl Serialize) -> Result<(), LineError> {
        lock(&self.lines).send(message)
    }

    /// Sends the message that `message` returns, if it returns one. It is called after all messages before it were sent.
    pub(super) fn send_now(
        &self,
        message: impl FnOnce() -> Option<FromHelper>,
    ) -> Result<(), LineError> {
        let mut lines = lock(&self.lines);
        message().map_or(Ok(()), |message| lines.send(&message))
    }

    fn request(&self, request: Request) -> Result<(), String> {
        let answers = lock(&self.answers);
        let sent = self.send(&FromHelper::Request(request));
        sent.map_err(|error| error.to_string())?;
        answers
            .recv()
            .unwrap_or_else(|_| Err("device process has ended".into()))
    }

    fn read(&self, mut lines: JsonLines, answers: &Sender<Result<(), String>>) {
        while let Ok(Some(message)) = lines.receive(Duration::MAX) {
            match message {
                ToHelper::Hints(runs) => {
                    if let Some(window) = &lock(&self.window).open {
                        for run in runs {
                            window.skip(run.into());
                        }
                    }
                }
                ToHelper::RoundEnded(why) => {
                    let outcome = why.map_or(WaitOutcome::Finished, WaitOutcome::Lost);
                    lock(&self.window).ended = Some(outcome);
                    self.changed.notify_all();
                }
                ToHelper::Punched(runs) => {
                    for run in runs {
                        self.punched.note(run.into());
                    }
                }
                ToHelper::Answer(answer) => {
                    // The receiver exists as long as this value.
                    let _ = answers.send(answer);
                }
            }
        }
        self.cancel.cancel();
    }
}

/// The device as the source of hints.
pub(super) struct RemoteHints {
    pub(super) device: Arc<RemoteDevice>,
    pub(super) discards: bool,
}

impl HintSource for RemoteHints {
    fn discards(&self) -> bool {
        self.discards
    }

    fn open(&mut self, window: HintWindow) -> Result<(), (HintWindow, HintSourceError)> {
        // Before the request: hints may arrive with its answer.
        *lock(&self.device.window) = Window {
            open: Some(window),
            ended: None,
        };
        let Err(why) = self.device.request(Request::Open) else {
            return Ok(());
        };
        match lock(&self.device.window).open.take() {
            Some(window) => Err((window, HintSourceError(why))),
            // Nothing else takes it.
            None => Ok(()),
        }
    }

    fn wait(&mut self, timeout: Duration, cancel: &CancelToken) -> WaitOutcome {
        let deadline = Instant::now().checked_add(timeout);
        let mut window = lock(&self.device.window);
        loop {
            if cancel.is_cancelled() {
                return WaitOutcome::Cancelled;
            }
            if let Some(outcome) = &window.ended {
                return outcome.clone();
            }
            let rest = deadline.map_or(TIMEOUT, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if rest.is_zero() {
                return WaitOutcome::TimedOut;
            }
            (window, _) = self
                .device
                .changed
                .wait_timeout(window, rest)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn close(&mut self) -> Result<HintWindow, HintSourceError> {
        // All hints of the device are applied before its answer is read.
        let closed = self.device.request(Request::Close);
        let window = lock(&self.device.window).open.take();
        closed.map_err(HintSourceError)?;
        window.ok_or_else(|| HintSourceError("no hint window is open".into()))
    }

    fn done(&mut self) {
        // Without a device process, nothing is left to do.
        let _ = self.device.request(Request::Done);
        lock(&self.device.window).open = None;
    }
}

/// Keeps the device from writing to guest memory.
pub(super) struct RemoteQuiesce(pub(super) Arc<RemoteDevice>);

impl Quiesce for RemoteQuiesce {
    fn process(&self) -> u32 {
        self.0.process
    }

    fn with_quiesced(&self, action: &mut dyn FnMut()) {
        if self.0.request(Request::Quiesce).is_err() {
            return;
        }
        action();
        // The device may have written meanwhile if it does not confirm.
        if self.0.request(Request::Release).is_err() {
            self.0.cancel.cancel();
        }
    }
}

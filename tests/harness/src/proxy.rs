// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A proxy between two sockets that fails on request.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

/// The number of bytes that [`ProxyFault::Slow`] forwards per interval, and the interval.
const SLOW_BYTES: u64 = 1 << 15;
const SLOW_INTERVAL: Duration = Duration::from_secs(1);

/// The way in which a proxy fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyFault {
    /// The proxy closes the connection, and both ends notice.
    Cut,
    /// The proxy forwards nothing any more. Neither end notices.
    Stall,
    /// The proxy forwards nothing until [`FaultProxy::allow_bytes`].
    Hold,
    /// The proxy forwards a few bytes per second until [`FaultProxy::allow_bytes`]: enough that neither end detects a
    /// stall, and too few for a migration to complete.
    Slow,
}

/// A proxy that forwards connections from one socket to another. The proxy fails after a number of bytes to the far
/// end.
#[derive(Debug)]
pub struct FaultProxy {
    socket: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    far: PathBuf,
    /// The number of bytes that may still pass.
    left: AtomicU64,
    forwarded_bytes: AtomicU64,
    fault: ProxyFault,
    ends: Mutex<Vec<UnixStream>>,
    /// Signalled when more bytes may pass, or when the connections are closed.
    changed: Condvar,
}

impl FaultProxy {
    /// Listens on `socket` and forwards each connection to `far`. The proxy fails when all connections together have
    /// forwarded `bytes` bytes.
    ///
    /// # Errors
    ///
    /// Fails if the proxy cannot listen on `socket`.
    pub fn start(socket: PathBuf, far: &Path, bytes: u64, fault: ProxyFault) -> Result<Self> {
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen at {}", socket.display()))?;
        let shared = Arc::new(Shared {
            far: far.to_owned(),
            left: AtomicU64::new(bytes),
            forwarded_bytes: AtomicU64::new(0),
            fault,
            ends: Mutex::default(),
            changed: Condvar::new(),
        });
        let this = shared.clone();
        // This thread ends with the process, because nothing else would wake it.
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if this.carry(near).is_err() {
                    this.cut();
                }
            }
        });
        Ok(Self { socket, shared })
    }

    /// Returns the socket of the proxy.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the number of bytes that have reached the far end.
    #[must_use]
    pub fn forwarded_bytes(&self) -> u64 {
        self.shared.forwarded_bytes.load(Ordering::Relaxed)
    }

    /// Returns whether the proxy has failed: no more bytes may pass.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.shared.left.load(Ordering::Relaxed) == 0
    }

    /// Allows exactly `bytes` more bytes to pass. Replaces the previous limit.
    pub fn allow_bytes(&self, bytes: u64) {
        let ends = self.shared.ends();
        self.shared.left.store(bytes, Ordering::Relaxed);
        drop(ends);
        self.shared.changed.notify_all();
    }

    /// Closes all connections.
    pub fn cut(&self) {
        self.shared.cut();
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.cut();
        // Later attempts to connect fail.
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Shared {
    fn carry(self: &Arc<Self>, near: UnixStream) -> Result<()> {
        let far = UnixStream::connect(&self.far)?;
        {
            let mut ends = self.ends();
            ends.push(near.try_clone()?);
            ends.push(far.try_clone()?);
        }
        let (mut back_from, mut back_to) = (far.try_clone()?, near.try_clone()?);
        thread::spawn(move || {
            let _ = std::io::copy(&mut back_from, &mut back_to);
            let _ = back_to.shutdown(Shutdown::Write);
        });
        let this = self.clone();
        thread::spawn(move || this.forward(near, far));
        Ok(())
    }

    fn forward(&self, mut near: UnixStream, mut far: UnixStream) {
        let mut buffer = vec![0; 1 << 16];
        'line: while let Ok(count) = near.read(&mut buffer) {
            if count == 0 {
                break;
            }
            let mut bytes = buffer.get(..count).unwrap_or_default();
            while !bytes.is_empty() {
                let (part, rest) = bytes.split_at(self.take(bytes.len()));
                // Count before the write, because the far end may report the bytes at once.
                self.forwarded_bytes
                    .fetch_add(part.len() as u64, Ordering::Relaxed);
                if far.write_all(part).is_err() {
                    self.forwarded_bytes
                        .fetch_sub(part.len() as u64, Ordering::Relaxed);
                    // The near end notices that the far end is closed. Answers still pass.
                    let _ = near.shutdown(Shutdown::Read);
                    break 'line;
                }
                bytes = rest;
                if self.left.load(Ordering::Relaxed) > 0 {
                    continue;
                }
                match self.fault {
                    ProxyFault::Cut => self.cut(),
                    // Other handles in `ends` keep both connections open until the proxy is dropped.
                    ProxyFault::Stall => return,
                    ProxyFault::Hold if !part.is_empty() => continue,
                    ProxyFault::Hold => {}
                    ProxyFault::Slow => {
                        thread::sleep(SLOW_INTERVAL);
                        let _ends = self.ends();
                        // Does nothing if `allow_bytes` was called during the sleep.
                        let left = &self.left;
                        let _ = left.compare_exchange(
                            0,
                            SLOW_BYTES,
                            Ordering::Relaxed,
                            Ordering::Relaxed,
                        );
                        continue;
                    }
                }
                break 'line;
            }
        }
        let _ = far.shutdown(Shutdown::Write);
    }

    fn ends(&self) -> MutexGuard<'_, Vec<UnixStream>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        let mut ends = self.ends();
        for end in ends.drain(..) {
            // The stream may be closed already.
            let _ = end.shutdown(Shutdown::Both);
        }
        drop(ends);
        self.changed.notify_all();
    }

    /// Takes up to `count` of the bytes that may pass. If the fault is [`ProxyFault::Hold`], waits until some may pass.
    /// Returns 0 if no bytes may pass.
    fn take(&self, count: usize) -> usize {
        let mut ends = self.ends();
        loop {
            let left = self.left.load(Ordering::Relaxed);
            let passing = usize::try_from(left).map_or(count, |left| left.min(count));
            if passing > 0 || self.fault != ProxyFault::Hold || ends.is_empty() {
                self.left.store(left - passing as u64, Ordering::Relaxed);
                return passing;
            }
            ends = self
                .changed
                .wait(ends)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn the_allowed_bytes_pass_and_answers_come_back() {
        let scratch = Scratch::new().unwrap();
        let far = UnixListener::bind(scratch.path("far")).unwrap();
        let proxy = FaultProxy::start(
            scratch.path("near"),
            &scratch.path("far"),
            100_000,
            ProxyFault::Cut,
        )
        .unwrap();
        let mut near = UnixStream::connect(proxy.socket()).unwrap();
        let (mut far, _) = far.accept().unwrap();
        far.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        near.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello");
        let writer = thread::spawn(move || near.write_all(&[7; 1 << 20]).is_err());
        let mut got = Vec::new();
        let _ = far.read_to_end(&mut got);
        assert_eq!(got.len(), 100_000);
        assert!(writer.join().unwrap());
        assert!(proxy.has_failed());
        assert_eq!(proxy.forwarded_bytes(), 100_000);
    }

    /// Returns a proxy that fails after three bytes, and its two ends.
    fn short_line(scratch: &Scratch, fault: ProxyFault) -> (FaultProxy, UnixStream, UnixStream) {
        let far = UnixListener::bind(scratch.path("far")).unwrap();
        let near = scratch.path("near");
        let proxy = FaultProxy::start(near, &scratch.path("far"), 3, fault).unwrap();
        let near = UnixStream::connect(proxy.socket()).unwrap();
        let (far, _) = far.accept().unwrap();
        (proxy, near, far)
    }

    #[test]
    fn a_proxy_that_holds_forwards_what_is_allowed_until_it_is_cut() {
        let scratch = Scratch::new().unwrap();
        let (proxy, mut near, mut far) = short_line(&scratch, ProxyFault::Hold);
        near.write_all(b"hello").unwrap();
        let mut got = [0; 3];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hel");
        proxy.allow_bytes(1);
        let mut got = [0; 1];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"l");
        proxy.cut();
        let mut rest = Vec::new();
        let _ = far.read_to_end(&mut rest);
        assert_eq!(rest, b"");
        assert_eq!(proxy.forwarded_bytes(), 4);
    }

    #[test]
    fn a_slow_proxy_forwards_all_and_ends_with_the_far_end() {
        let scratch = Scratch::new().unwrap();
        let (_wire, mut near, mut far) = short_line(&scratch, ProxyFault::Slow);
        near.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        far.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        drop(far);
        let bytes = [7; 1 << 16];
        while near.write_all(&bytes).is_ok() {}
    }
}

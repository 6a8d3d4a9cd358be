// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The counters of our driver, from its file in the guest's debugfs.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use guest_agent::calls::ReadFile;

use crate::guest::Guest;

const FOLDER: &str = "/sys/kernel/debug/virtio_balloon_rs";

/// The counters of a device at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters(pub BTreeMap<String, u64>);

impl Counters {
    /// Returns the counter with the name `key`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such counter.
    pub fn get(&self, key: &str) -> Result<u64> {
        let value = self.0.get(key).copied();
        value.with_context(|| format!("the driver has no counter {key}: {:?}", self.0.keys()))
    }

    fn parse(text: &str) -> Result<Self> {
        let line = |line: &str| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.parse().ok()?))
        };
        let all: Option<BTreeMap<_, _>> = text.lines().map(line).collect();
        all.map(Self)
            .with_context(|| format!("not keys and numbers: {text:?}"))
    }
}

impl Guest {
    /// Returns the counters of our driver for its only device.
    ///
    /// # Errors
    ///
    /// Fails if the driver has not exactly one device, or the file has another format.
    pub fn counters(&mut self) -> Result<Counters> {
        let devices = self.devices_with_counters()?;
        ensure!(
            devices.len() == 1,
            "not one device with counters: {devices:?}"
        );
        let path = format!("{FOLDER}/{}/counters", devices[0]);
        Counters::parse(&self.call(ReadFile { path })?)
    }

    /// Waits until the counter `key` is at least `at_least`, and returns all counters. The guest has no event for this.
    ///
    /// # Errors
    ///
    /// Fails if the counter is still lower after `timeout`.
    pub fn wait_counter(
        &mut self,
        key: &str,
        at_least: u64,
        timeout: Duration,
    ) -> Result<Counters> {
        let deadline = Instant::now() + timeout;
        loop {
            let now = self.counters()?;
            if now.get(key)? >= at_least {
                return Ok(now);
            }
            ensure!(
                Instant::now() < deadline,
                "{key} is not {at_least} after {timeout:?}: {now:?}"
            );
            sleep(Duration::from_millis(10));
        }
    }

    /// Lists the devices that have a folder for counters.
    ///
    /// # Errors
    ///
    /// Same as [`crate::agent::AgentClient::call`].
    pub fn devices_with_counters(&mut self) -> Result<Vec<String>> {
        self.list_folder(FOLDER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_are_read() {
        let counters = Counters::parse("a_b 1\nc 20\n").unwrap();
        assert_eq!(counters.get("c").unwrap(), 20);
        assert!(counters.get("d").is_err());
        assert!(Counters::parse("a b 1\n").is_err());
        assert!(Counters::parse("a -1\n").is_err());
    }
}

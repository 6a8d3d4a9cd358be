// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls about the virtio balloon devices that the guest kernel has found.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use guest_agent::calls::{BalloonDevice, ListBalloonDevices, WaitBalloonDevices};

use crate::serve::HandleCall;

const FOLDER: &str = "/sys/bus/virtio/devices";
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// The virtio device id of a balloon, in the form that sysfs uses.
const BALLOON: &str = "0x0005";
/// The device status bit with which a driver reports that it is ready.
const DRIVER_OK: u32 = 4;

impl HandleCall for ListBalloonDevices {
    fn handle(self) -> Result<Vec<BalloonDevice>> {
        let devices = fs::read_dir(FOLDER).with_context(|| format!("cannot list {FOLDER}"))?;
        devices
            .filter_map(|device| {
                device
                    .and_then(|device| read_device(&device.path()))
                    .transpose()
            })
            .collect::<io::Result<_>>()
            .with_context(|| format!("cannot read {FOLDER}"))
    }
}

/// Returns the device at `path`, or `None` if it is not a balloon or no longer exists.
fn read_device(path: &Path) -> io::Result<Option<BalloonDevice>> {
    let read = |name: &str| match fs::read_to_string(path.join(name)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound) => Ok(None),
        // ENODEV: the device was removed while the file was open.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    };
    let parts = (read("device")?, read("features")?, read("status")?);
    let (Some(device), Some(features), Some(status)) = parts else {
        return Ok(None);
    };
    if device != BALLOON {
        return Ok(None);
    }
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    Ok(Some(BalloonDevice {
        name: name(path).unwrap_or_default(),
        features: parse_features(&features),
        driver_ok: parse_status(&status) & DRIVER_OK != 0,
        driver: fs::read_link(path.join("driver"))
            .ok()
            .as_deref()
            .and_then(name),
    }))
}

/// Parses a device status such as `0x0000000f`.
fn parse_status(text: &str) -> u32 {
    let digits = text.trim_start_matches("0x");
    u32::from_str_radix(digits, 16).unwrap_or_default()
}

/// Parses feature bits: one digit for each bit, the lowest bit first.
fn parse_features(text: &str) -> u64 {
    let bits = text.bytes().take(64).zip(0..);
    bits.filter(|(digit, _)| *digit == b'1')
        .fold(0, |all, (_, bit)| all | 1 << bit)
}

impl HandleCall for WaitBalloonDevices {
    fn handle(self) -> Result<Vec<BalloonDevice>> {
        let deadline = Instant::now() + Duration::from_millis(self.timeout_ms);
        loop {
            let balloons = ListBalloonDevices {}.handle()?;
            let driver_ok = |balloon: &BalloonDevice| balloon.driver_ok || !self.driver_ok;
            if balloons.len() == self.count && balloons.iter().all(driver_ok) {
                return Ok(balloons);
            }
            if Instant::now() > deadline {
                bail!(
                    "there are not {} balloon devices (ready) after {} ms, but {balloons:?}",
                    self.count,
                    self.timeout_ms
                );
            }
            sleep(POLL_INTERVAL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_hexadecimal() {
        assert_eq!(parse_status("0x0000001f"), 31);
    }

    #[test]
    fn the_lowest_feature_bit_comes_first() {
        assert_eq!(parse_features("0101"), 0b1010);
        assert_eq!(
            parse_features(&format!("{}1{}", "0".repeat(63), "1".repeat(64))),
            1 << 63
        );
    }
}

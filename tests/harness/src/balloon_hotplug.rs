// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hot-plug and hot-unplug of the balloon device.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use guest_agent::calls::{BalloonDevice, ListBalloonDevices, Modules, WaitBalloonDevices};
use serde_json::{json, Map, Value};

use crate::daemon::Daemon;
use crate::guest::{Device, Driver, Guest};
use crate::vmm::qemu::{self, BALLOON_ID, CHARDEV};
use crate::vmm::Attachment;
use crate::{HANG_TIMEOUT, HANG_TIMEOUT_MS};

impl Guest {
    /// Plugs our device with `features`, or QEMU's own device, into the slot, which must be empty.
    ///
    /// Waits until the guest has found the device. If a driver is loaded, also waits until the driver is ready.
    /// `options` are the same as for [`Builder::device_options`].
    ///
    /// [`Builder::device_options`]: crate::guest::Builder::device_options
    ///
    /// # Errors
    ///
    /// Fails if QEMU refuses, or the guest does not find the device.
    pub fn plug(&mut self, device: Device, features: &[&str], options: &[&str]) -> Result<()> {
        let attachment = match device {
            Device::None => bail!("there is nothing to plug in"),
            Device::QemuOwn => Attachment::QemuOwn(qemu::properties(options)),
            Device::Ours => {
                let daemon = Daemon::start(&self.daemon_program, &self.scratch, features, options)?;
                let path = daemon.socket().to_owned();
                self.daemon = Some(daemon);
                let address = json!({ "type": "unix", "data": { "path": path } });
                let data = json!({ "addr": address, "server": false });
                let backend = json!({ "type": "socket", "data": data });
                let chardev = json!({ "id": CHARDEV, "backend": backend });
                self.monitor()?.command("chardev-add", chardev)?;
                Attachment::VhostUser(path)
            }
        };
        let is_ours = matches!(attachment, Attachment::VhostUser(_));
        let device =
            qemu::balloon_properties(&attachment, true, &Map::new()).context("no device")?;
        self.monitor()?.command("device_add", device)?;
        let modules = self.call(Modules {})?;
        let loaded = |driver: Driver| modules.iter().any(|name| name == driver.module_name());
        let driver_ok = loaded(Driver::Ours) || loaded(Driver::C);
        self.call(WaitBalloonDevices {
            count: 1,
            driver_ok,
            timeout_ms: HANG_TIMEOUT_MS,
        })?;
        if driver_ok && is_ours {
            // The guest's driver is ready a moment before QEMU notifies the daemon.
            self.daemon()?.wait_driver()?;
        }
        Ok(())
    }

    /// Asks the guest to release the balloon, and returns at once.
    ///
    /// # Errors
    ///
    /// Fails if QEMU refuses.
    pub fn start_unplug(&mut self) -> Result<()> {
        let monitor = self.monitor()?;
        monitor.clear_events();
        monitor
            .command("device_del", json!({ "id": BALLOON_ID }))
            .map(drop)
    }

    /// Waits until the guest has released the balloon. If the device is ours, also waits until the daemon has ended.
    ///
    /// # Errors
    ///
    /// Fails if the guest keeps the balloon for [`HANG_TIMEOUT`], or the daemon ends with an error.
    pub fn finish_unplug(&mut self) -> Result<()> {
        let gone = self.monitor()?.wait_event(
            |event| {
                event.name == "DEVICE_DELETED"
                    && event.data.get("device").and_then(Value::as_str) == Some(BALLOON_ID)
            },
            HANG_TIMEOUT,
        )?;
        gone.with_context(|| format!("the guest kept the balloon for {HANG_TIMEOUT:?}"))?;
        if let Some(mut daemon) = self.daemon.take() {
            self.remove_chardev()?;
            let status = daemon
                .wait()
                .with_context(|| daemon.process().diagnostics())?;
            ensure!(status.success(), "the daemon ended with {status}");
        }
        Ok(())
    }

    /// Unplugs the balloon.
    ///
    /// # Errors
    ///
    /// Fails if QEMU refuses, or the guest keeps the balloon.
    pub fn unplug(&mut self) -> Result<()> {
        self.start_unplug()?;
        self.finish_unplug()
    }

    /// Removes the device's chardev. Retries, because QEMU releases the chardev shortly after the `DEVICE_DELETED`
    /// event.
    fn remove_chardev(&mut self) -> Result<()> {
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            match self
                .monitor()?
                .command("chardev-remove", json!({ "id": CHARDEV }))
            {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Returns the guest's only balloon device.
    ///
    /// # Errors
    ///
    /// Fails if the guest has no balloon device, or several.
    pub fn balloon_device(&mut self) -> Result<BalloonDevice> {
        let balloons = self.call(ListBalloonDevices {})?;
        match <[BalloonDevice; 1]>::try_from(balloons) {
            Ok([balloon]) => Ok(balloon),
            Err(balloons) => bail!("the guest has not one balloon but {balloons:?}"),
        }
    }
}

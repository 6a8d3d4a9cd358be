// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A balloon that is plugged into a running machine, and pulled from it.

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
    /// Plugs a balloon into the slot, which must be empty, and waits until the guest has found it, and its driver,
    /// if that is loaded, is ready: our device with
    /// `features`, or QEMU's own. `options` are as for [`Builder::device_options`].
    ///
    /// [`Builder::device_options`]: crate::guest::Builder::device_options
    ///
    /// # Errors
    ///
    /// If QEMU refuses, or the guest does not find it.
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
            // The guest knows it a moment before QEMU has told the device.
            self.daemon()?.wait_driver()?;
        }
        Ok(())
    }

    /// Asks the guest to let the balloon go, and returns at once.
    ///
    /// # Errors
    ///
    /// If QEMU refuses.
    pub fn start_unplug(&mut self) -> Result<()> {
        let monitor = self.monitor()?;
        monitor.clear_events();
        monitor
            .command("device_del", json!({ "id": BALLOON_ID }))
            .map(drop)
    }

    /// Waits until the guest has let the balloon go, and, if it was our device, until the daemon has ended.
    ///
    /// # Errors
    ///
    /// If it does not.
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

    /// Pulls the balloon.
    ///
    /// # Errors
    ///
    /// If QEMU refuses, or the guest keeps it.
    pub fn unplug(&mut self) -> Result<()> {
        self.start_unplug()?;
        self.finish_unplug()
    }

    /// QEMU lets the device's chardev go a little after it has told of the device's end.
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

    /// The guest's one balloon device.
    ///
    /// # Errors
    ///
    /// If it has none or several.
    pub fn balloon_device(&mut self) -> Result<BalloonDevice> {
        let balloons = self.call(ListBalloonDevices {})?;
        match <[BalloonDevice; 1]>::try_from(balloons) {
            Ok([balloon]) => Ok(balloon),
            Err(balloons) => bail!("the guest has not one balloon but {balloons:?}"),
        }
    }
}

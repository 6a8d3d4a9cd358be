// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests the sample driver of `guest-driver/samples`.

use std::fmt::Write;
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Device};
use harness::scratch::Scratch;
use harness::vmm::hardware::Hardware;
use harness::vmm::Vmm;
use harness::HANG_TIMEOUT;

/// The number of bytes that the driver reads from a device.
const BYTES: u8 = u8::MAX;

/// The entropy of QEMU's device is a file. The driver reads the first half, and after it was loaded again the second one.
#[test]
fn the_sample_driver_in_qemu_reads_what_an_entropy_device_has() -> Result<()> {
    const FILE: &str = "/sys/kernel/debug/virtio_rng_sample/virtio*/bytes";

    let artifacts = Artifacts::load()?;
    let stock = artifacts.stock.as_ref().context("no stock kernel")?;
    let module = stock.sample_driver.as_ref().context("no sample driver")?;
    let scratch = Scratch::new()?;
    let source: Vec<u8> = (0..=BYTES).chain((0..=BYTES).rev()).collect();
    fs::write(scratch.path("entropy"), &source)?;
    let backend = format!(
        "rng-random,id=rng0,filename={}",
        scratch.path("entropy").display()
    );
    let arguments = ["-object", &backend, "-device", "virtio-rng-pci,rng=rng0"];
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .device(Device::None)
        .hardware(Hardware {
            arguments: arguments.map(str::to_owned).to_vec(),
            ..Hardware::default()
        })
        .files(&[("/modules/virtio_rng_sample.ko", module)])
        .boot()?;
    for half in source.chunks(source.len() / 2) {
        let mut expected = String::new();
        for byte in half {
            write!(expected, "{byte:02x}")?;
        }
        guest.load_module("virtio_rng_sample")?;
        let deadline = Instant::now() + HANG_TIMEOUT;
        loop {
            let text = guest.shell(&format!("cat {FILE}"))?;
            if text.trim() == expected {
                break;
            }
            ensure!(expected.starts_with(text.trim()), "{text:?} is read");
            ensure!(Instant::now() < deadline, "only {text:?} is read");
            sleep(Duration::from_millis(20));
        }
        guest.shell("rmmod virtio_rng_sample")?;
    }
    guest.check_log()?;
    guest.power_off()?;
    Ok(())
}

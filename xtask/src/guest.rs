// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opens a shell in a guest.

use std::io::stdin;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use harness::calls::Shell;
use harness::guest::{Builder, Device, Driver};
use harness::vmm::Vmm;
use nix::sys::termios::{tcgetattr, tcsetattr, SetArg};

use crate::build::{self, Profile};
use crate::progress::say;
use crate::setup::{self, Kernel};

/// The options of `guest`.
#[derive(Args)]
pub struct Options {
    /// What runs the guest.
    #[arg(long, default_value = "qemu")]
    vmm: VmmChoice,
    /// The driver that is loaded.
    #[arg(long, default_value = "ours")]
    driver: DriverChoice,
    /// The device that it finds; user-mode Linux has only ours.
    #[arg(long, default_value = "ours")]
    device: DeviceChoice,
    /// The guest's memory, in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(64..))]
    memory: u64,
    /// What our device offers.
    #[arg(long, value_delimiter = ',', default_value = "free-page-hint")]
    features: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum VmmChoice {
    Qemu,
    Uml,
    Debug,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DriverChoice {
    Ours,
    C,
    None,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceChoice {
    Ours,
    Qemu,
}

/// Runs the `guest` command.
pub fn command(options: &Options) -> Result<()> {
    let (vmm, kernel) = match options.vmm {
        VmmChoice::Qemu => (Vmm::Qemu, Kernel::Stock),
        VmmChoice::Uml => (Vmm::Uml, Kernel::Uml),
        VmmChoice::Debug => (Vmm::Debug, Kernel::Debug),
    };
    let device = match options.device {
        DeviceChoice::Ours => Device::Ours,
        DeviceChoice::Qemu => Device::QemuOwn,
    };
    let build_env = setup::ensure(&[kernel])?;
    let artifacts = build::artifacts(&build_env, &[kernel], Profile::Release)?;
    // The VMM makes the terminal raw. The settings are restored here even if the VMM dies.
    let terminal = stdin();
    let settings = tcgetattr(&terminal).context("a shell needs a terminal")?;
    say("booting; `exit` ends the shell and the guest");
    let features: Vec<&str> = options.features.iter().map(String::as_str).collect();
    let builder = Builder::new(&artifacts, vmm)
        .device(device)
        .features(&features)
        .memory(options.memory * harness::MIB);
    let outcome = builder.on_terminal().boot().and_then(|mut guest| {
        match options.driver {
            DriverChoice::Ours => guest.load(Driver::Ours)?,
            DriverChoice::C => guest.load(Driver::C)?,
            DriverChoice::None => {}
        }
        if let Ok(daemon) = guest.daemon() {
            println!(
                "the daemon's control socket: {}\r",
                daemon.qmp_socket().display()
            );
        }
        guest.agent().call_within(Shell {}, Duration::MAX)?;
        guest.power_off().map(drop)
    });
    tcsetattr(&terminal, SetArg::TCSANOW, &settings).context("cannot restore the terminal")?;
    outcome
}

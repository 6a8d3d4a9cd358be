// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Failing memory allocations, through the fault injection of the debug kernel.

use std::ops::Range;

use anyhow::{ensure, Context, Result};
use guest_agent::calls::{FailNthResult, LoadModuleFailNth, ReadFile, WriteFile, WriteFileFailNth};
use nix::errno::Errno;

use crate::guest::{Driver, Guest};
use crate::initramfs;

const FOLDER: &str = "/sys/kernel/debug";
/// The fault injectors for slab objects and for pages.
const INJECTORS: [&str; 2] = ["failslab", "fail_page_alloc"];

/// The maximum number of random failures for each injector: more than a test causes. The kernel counts down from it, so
/// the difference is the number of failures.
const TIMES: u64 = 1_000_000_000;

/// The function in which user-mode Linux requests an interrupt. If an allocation fails, this function does not undo its
/// earlier steps, and warns when the same file descriptor is used again.
pub const IRQ_FUNCTIONS: [&str; 1] = ["um_request_irq"];

/// The functions in which user-mode Linux reads and writes the config space. If an allocation fails, they do nothing
/// and report nothing, so the driver cannot know.
pub const CONFIG_FUNCTIONS: [&str; 2] = ["vu_get", "vu_set"];

/// The allocations that may fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultScope {
    /// All allocations.
    All,
    /// Allocations that code in this address range makes, directly or through other functions.
    Code(Range<u64>),
}

impl Guest {
    /// Returns the address range of a loaded module's code.
    ///
    /// # Errors
    ///
    /// Fails if the module is not loaded.
    pub fn module_code(&mut self, driver: Driver) -> Result<Range<u64>> {
        let modules = self.call(ReadFile {
            path: "/proc/modules".to_owned(),
        })?;
        let parse = |line: &str| {
            // The format is `name size uses users state address`.
            let mut words = line.split_whitespace();
            (words.next()? == driver.module_name()).then_some(())?;
            let size: u64 = words.next()?.parse().ok()?;
            let start = words.nth(3)?.strip_prefix("0x")?;
            let start = u64::from_str_radix(start, 16).ok()?;
            Some(start..start + size)
        };
        modules
            .lines()
            .find_map(parse)
            .with_context(|| format!("{} is not in {modules:?}", driver.module_name()))
    }

    /// Returns the address range from the first to the last of the kernel functions `names`.
    fn function_range(&mut self, names: &[&str]) -> Result<Range<u64>> {
        let symbols = self.call(ReadFile {
            path: "/proc/kallsyms".to_owned(),
        })?;
        let mut symbols: Vec<_> = symbols
            .lines()
            .filter_map(|line| {
                // The format is `address type name`.
                let mut words = line.split_whitespace();
                let address = u64::from_str_radix(words.next()?, 16).ok()?;
                Some((address, words.nth(1)?))
            })
            .collect();
        symbols.sort_unstable();
        let (mut first, mut last) = (u64::MAX, 0);
        for name in names {
            let found = symbols.iter().find(|(_, other)| other == name);
            let (start, _) = found.with_context(|| format!("the kernel has no {name}"))?;
            let next = symbols.iter().find(|(address, _)| address > start);
            let (end, _) = next.with_context(|| format!("nothing follows {name}"))?;
            (first, last) = (first.min(*start), last.max(*end));
        }
        Ok(first..last)
    }

    /// Selects the allocations that may fail from now on, regardless of their flags and size. None of them fails yet.
    ///
    /// Allocations by the functions `excluded`, and by functions between them in memory, do not fail.
    ///
    /// # Errors
    ///
    /// Fails if the kernel has no fault injection.
    pub fn configure_fault_injection(
        &mut self,
        scope: &FaultScope,
        excluded: &[&str],
    ) -> Result<()> {
        let range = match scope {
            FaultScope::All => 0..u64::MAX,
            FaultScope::Code(range) => range.clone(),
        };
        let excluded = self.function_range(excluded)?;
        for injector in INJECTORS {
            self.set_fault(injector, "probability", "0")?;
            // Otherwise the injector logs each failure.
            self.set_fault(injector, "verbose", "0")?;
            self.set_fault(injector, "ignore-gfp-wait", "N")?;
            for (name, address) in [
                ("require-start", range.start),
                ("require-end", range.end),
                ("reject-start", excluded.start),
                ("reject-end", excluded.end),
            ] {
                self.set_fault(injector, name, &format!("{address:#x}"))?;
            }
        }
        self.set_fault("fail_page_alloc", "ignore-gfp-highmem", "N")?;
        self.set_fault("fail_page_alloc", "min-order", "0")
    }

    /// Makes `percent` percent of the allocations fail that [`Guest::configure_fault_injection`] has selected.
    ///
    /// # Errors
    ///
    /// Fails if the kernel has no fault injection.
    pub fn set_fault_probability(&mut self, percent: u32) -> Result<()> {
        for injector in INJECTORS {
            self.set_fault(injector, "times", &TIMES.to_string())?;
            self.set_fault(injector, "probability", &percent.to_string())?;
        }
        Ok(())
    }

    /// Returns the number of failed allocations since [`Guest::set_fault_probability`].
    ///
    /// # Errors
    ///
    /// Fails if the kernel has no fault injection.
    pub fn injected_failures(&mut self) -> Result<u64> {
        let mut failed = 0;
        for injector in INJECTORS {
            let path = format!("{FOLDER}/{injector}/times");
            let left: u64 = self
                .call(ReadFile { path })?
                .trim()
                .parse()
                .context("strange number of times")?;
            failed += TIMES.saturating_sub(left);
        }
        Ok(failed)
    }

    fn set_fault(&mut self, injector: &str, name: &str, value: &str) -> Result<()> {
        self.call(WriteFile {
            path: format!("{FOLDER}/{injector}/{name}"),
            text: value.to_owned(),
        })
    }

    /// Unbinds the balloon device from our driver.
    ///
    /// # Errors
    ///
    /// Fails if the device is not bound.
    pub fn unbind(&mut self) -> Result<()> {
        let text = self.balloon_device()?.name;
        let path = driver_attribute("unbind");
        self.call(WriteFile { path, text })
    }

    /// Binds the balloon device to our driver, and waits until the device is ready.
    ///
    /// # Errors
    ///
    /// Fails if the guest refuses.
    pub fn bind(&mut self) -> Result<()> {
        let text = self.balloon_device()?.name;
        let path = driver_attribute("bind");
        self.call(WriteFile { path, text })?;
        self.daemon()?.wait_driver()
    }

    /// Binds the balloon device while the `nth` of the selected allocations fails. See
    /// [`Guest::configure_fault_injection`].
    ///
    /// # Errors
    ///
    /// Fails unless the device is bound, or the result is "out of memory" and the device is not bound.
    pub fn bind_fail_nth(&mut self, nth: u32) -> Result<FailNthResult> {
        let text = self.balloon_device()?.name;
        let path = driver_attribute("bind");
        let outcome = self.call(WriteFileFailNth { path, text, nth })?;
        self.check_fail_nth(&outcome)
            .with_context(|| format!("allocation {nth} of binding failed"))?;
        Ok(outcome)
    }

    /// Loads our driver while the `nth` of the selected allocations fails. See [`Guest::configure_fault_injection`].
    ///
    /// # Errors
    ///
    /// Fails if loading returns an error other than "out of memory" or "invalid argument", or if it returns "out of
    /// memory" and the device is bound. The kernel returns "invalid argument" if it cannot make the module's folder for
    /// drivers.
    pub fn load_fail_nth(&mut self, nth: u32) -> Result<FailNthResult> {
        let path = initramfs::module_path(&format!("{}.ko", Driver::Ours.module_name()));
        let parameters = String::new();
        let outcome = self.call(LoadModuleFailNth {
            path,
            parameters,
            nth,
        })?;
        // Without an error, the device may be bound or not: the registration of a driver succeeds even if a probe
        // fails.
        if outcome
            .error
            .is_some_and(|error| error != Errno::EINVAL as i32)
        {
            self.check_fail_nth(&outcome)
                .with_context(|| format!("allocation {nth} of loading failed"))?;
        }
        Ok(outcome)
    }

    fn check_fail_nth(&mut self, outcome: &FailNthResult) -> Result<()> {
        let device = self.balloon_device()?;
        let clean = match outcome.error {
            None => device.driver.is_some(),
            Some(error) => device.driver.is_none() && error == Errno::ENOMEM as i32,
        };
        ensure!(clean, "{outcome:?}, {device:?}");
        Ok(())
    }
}

fn driver_attribute(name: &str) -> String {
    format!(
        "/sys/bus/virtio/drivers/{}/{name}",
        Driver::Ours.module_name()
    )
}

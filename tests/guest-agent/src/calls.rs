// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The calls that the guest agent answers, and the types of their replies.
//!
//! Sizes are in bytes, timeouts in milliseconds.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ranges::RangeSet;

/// A call from the host to the guest agent.
pub trait Call: Into<AnyCall> {
    /// The reply that the agent sends when the call has succeeded.
    type Reply: Serialize + DeserializeOwned;
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident $({ $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })? -> $answer:ty;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
            pub struct $name { $($($(#[$field_doc])* pub $field: $type,)*)? }

            impl Call for $name {
                type Reply = $answer;
            }

            impl From<$name> for AnyCall {
                fn from(call: $name) -> Self {
                    Self::$name(call)
                }
            }
        )*

        /// Any of the calls, in the form in which the protocol carries it.
        #[derive(Clone, Debug, Serialize, Deserialize)]
        pub enum AnyCall {
            $(
                $(#[$doc])*
                $name($name),
            )*
        }
    };
}

calls! {
    /// Reads `/proc/meminfo`.
    MemInfo -> MemInfoFields;

    /// Reads `/proc/buddyinfo`: the number of free blocks of each zone and order.
    BuddyInfo -> Vec<BuddyInfoZone>;

    /// Waits until `MemFree` is within two bounds. The kernel has no event for this, so the agent polls every 10 ms.
    WaitMemFree {
        /// The lower bound of `MemFree`, in bytes.
        at_least: u64,
        /// The upper bound of `MemFree`, in bytes.
        at_most: u64,
        /// The timeout.
        timeout_ms: u64,
    } -> MemInfoFields;

    /// Waits until `MemFree` is stable: it changes by less than `tolerance` over `stable_samples` consecutive samples,
    /// one every 10 ms.
    ///
    /// The agent counts samples, not time. If the host does not run the guest's processors for a while, time passes
    /// although the guest has not settled.
    WaitMemSettled {
        /// The change that counts as stable, in bytes (exclusive).
        tolerance: u64,
        /// The number of consecutive stable samples.
        stable_samples: u32,
        /// The timeout.
        timeout_ms: u64,
    } -> MemInfoFields;

    /// Samples `MemFree` continuously, without a pause, and returns the minimum.
    LowestMemFree {
        /// How long to sample.
        duration_ms: u64,
    } -> MemFreeMinimum;

    /// Returns the pages in free blocks (`/proc/kpageflags`). Pages on per-CPU lists are not included.
    FreePages -> RangeSet;

    /// Returns the guest's pages by use (`/proc/kpageflags`).
    PageUse -> PagesByUse;

    /// Drops the kernel's caches, compacts memory, and folds the per-CPU counters into the global ones, so that memory
    /// usage is comparable with that of another moment. A control that the kernel lacks is skipped.
    DropCachesAndCompact -> ();

    /// Starts a process that maps memory and fills every page with its own pattern.
    ///
    /// One page in every `keep_every` is *kept* until [`Free`]. The pages are filled in order, so most neighbours in
    /// that order are neighbours in physical memory. [`Release`] gives the other pages back to the kernel. If
    /// `keep_every` is 0, no page is kept; if it is 1, all pages are kept.
    Fill {
        /// The number of bytes to fill, rounded down to whole pages.
        bytes: u64,
        /// One page in this many is kept.
        keep_every: u64,
        /// The seed of the patterns.
        seed: u64,
    } -> Filled;

    /// Gives the pages of a workload that are not kept back to the kernel.
    Release {
        /// The workload, from [`Filled::workload`].
        workload: u32,
    } -> ();

    /// Gives some of a workload's pages that are not kept back to the kernel: those with the lowest physical addresses.
    ReleaseLowest {
        /// The workload, from [`Filled::workload`].
        workload: u32,
        /// The number of pages.
        pages: u64,
    } -> ();

    /// Ends a workload's process, which frees all its memory.
    Free {
        /// The workload, from [`Filled::workload`].
        workload: u32,
    } -> ();

    /// Compares every kept page of a workload with its pattern.
    Verify {
        /// The workload, from [`Filled::workload`].
        workload: u32,
    } -> Verified;

    /// Returns the physical ranges of a workload's kept pages (`/proc/PID/pagemap`).
    KeptPages {
        /// The workload, from [`Filled::workload`].
        workload: u32,
    } -> RangeSet;

    /// Starts a process that uses memory as a busy guest does, until [`StopChurn`]. The process maps pieces of memory,
    /// fills them with patterns, compares them and unmaps them, in an order that depends only on the seed.
    ///
    /// Returns the number of the workload.
    ChurnMemory {
        /// The maximum that is mapped at a time, in bytes.
        bytes: u64,
        /// The seed of the order and the patterns.
        seed: u64,
        /// After each step the process sleeps for so many times the duration of the step.
        rest: u32,
    } -> u32;

    /// Starts a process that uses the page cache, until [`StopChurn`]. The process writes files in the guest's tmpfs,
    /// overwrites parts of them, reads them and compares them with what it wrote, truncates them and removes them.
    ///
    /// Returns the number of the workload.
    ChurnFiles {
        /// The maximum size of all files together, in bytes.
        bytes: u64,
        /// The seed of the order and the patterns.
        seed: u64,
        /// After each step the process sleeps for so many times the duration of the step.
        rest: u32,
    } -> u32;

    /// Starts a process that forks continuously, until [`StopChurn`]. Each child compares the memory that it shares
    /// with the parent, writes to its own copy, compares again and ends. The parent writes to its copy meanwhile.
    ///
    /// Returns the number of the workload.
    ChurnForks {
        /// The size of the memory that the process shares with its children.
        bytes: u64,
        /// The seed of the patterns and of the choice of pages to write.
        seed: u64,
        /// After each step the process sleeps for so many times the duration of the step.
        rest: u32,
    } -> u32;

    /// Returns the statistics of a churn workload so far. The workload continues.
    ChurnProgress {
        /// The workload, from the reply to [`ChurnMemory`], [`ChurnFiles`] or [`ChurnForks`].
        workload: u32,
    } -> ChurnStats;

    /// Ends a churn workload. The process compares all its remaining pages first.
    StopChurn {
        /// The workload, from the reply to [`ChurnMemory`], [`ChurnFiles`] or [`ChurnForks`].
        workload: u32,
    } -> ChurnStats;

    /// Lists the guest's balloon devices.
    ListBalloonDevices -> Vec<BalloonDevice>;

    /// Waits until the guest has exactly `count` balloon devices, each with a driver that is ready if `driver_ok` is
    /// set.
    ///
    /// The kernel announces devices by uevents, which need a daemon to collect them. The agent polls every 5 ms
    /// instead.
    WaitBalloonDevices {
        /// The number of devices.
        count: usize,
        /// Whether each device must have a driver that has set `DRIVER_OK`.
        driver_ok: bool,
        /// The timeout.
        timeout_ms: u64,
    } -> Vec<BalloonDevice>;

    /// Loads a module from the initramfs.
    LoadModule {
        /// The path of the module in the guest.
        path: String,
        /// The module's parameters, in the form that `insmod` takes.
        parameters: String,
    } -> ();

    /// Unloads a module. Fails at once if the module is in use.
    UnloadModule {
        /// The module's name, as in `/proc/modules`.
        name: String,
    } -> ();

    /// Lists the names of the loaded modules.
    Modules -> Vec<String>;

    /// Returns the records of the kernel log since the last [`KernelLog`] call.
    KernelLog -> Vec<KernelLogRecord>;

    /// Waits for a record of the kernel log that contains a text. The search starts at the oldest record.
    WaitKernelLog {
        /// The text to search for.
        substring: String,
        /// The lowest sequence number that matches.
        from: u64,
        /// The timeout.
        timeout_ms: u64,
    } -> KernelLogRecord;

    /// Returns the results of the KUnit suites that have run, by suite, in KTAP. Empty if the kernel has no KUnit.
    KunitResults -> BTreeMap<String, String>;

    /// Reads a file of the guest as text.
    ReadFile {
        /// The path of the file.
        path: String,
    } -> String;

    /// Lists the names in a folder of the guest, sorted. Empty if the folder does not exist.
    ListFolder {
        /// The path of the folder.
        path: String,
    } -> Vec<String>;

    /// Writes to an existing file of the guest, for example in `/sys` or `/proc`.
    WriteFile {
        /// The path of the file.
        path: String,
        /// The text to write, in one system call.
        text: String,
    } -> ();

    /// Does the same as [`WriteFile`], and makes one of the kernel's memory allocations for the write fail.
    ///
    /// The kernel's fault injection settings in debugfs select the allocations that count. A kernel without fault
    /// injection refuses the call.
    WriteFileFailNth {
        /// The path of the file.
        path: String,
        /// The text to write, in one system call.
        text: String,
        /// The number of the allocation that fails, from 1.
        nth: u32,
    } -> FailNthResult;

    /// Does the same as [`LoadModule`], and makes one of the kernel's memory allocations for the module fail.
    LoadModuleFailNth {
        /// The path of the module in the guest.
        path: String,
        /// The module's parameters, in the form that `insmod` takes.
        parameters: String,
        /// The number of the allocation that fails, from 1.
        nth: u32,
    } -> FailNthResult;

    /// Runs a program and waits until it ends. A name without a slash is a busybox applet.
    Run {
        /// The program and its arguments.
        argv: Vec<String>,
    } -> CommandOutput;

    /// Connects a shell to the console and waits until the shell ends.
    Shell -> ();

    /// Loads a kernel. [`KexecExec`] starts it without a reset of the machine.
    KexecLoad {
        /// The path of the kernel in the guest.
        kernel: String,
        /// The path of the kernel's initramfs in the guest.
        initramfs: String,
        /// The kernel's command line.
        command_line: String,
    } -> ();

    /// Starts the kernel that [`KexecLoad`] loaded. The agent replies first. The agent of the new kernel then sends a
    /// new [`Hello`](crate::protocol::Hello).
    KexecExec -> ();

    /// Switches the guest off. The agent replies first.
    PowerOff -> ();
}

/// The fields of `/proc/meminfo`, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemInfoFields(pub BTreeMap<String, u64>);

impl MemInfoFields {
    /// Returns the value of a field, or 0 if the kernel does not have the field.
    #[must_use]
    pub fn field(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// Returns the memory that the kernel manages (`MemTotal`).
    #[must_use]
    pub fn total(&self) -> u64 {
        self.field("MemTotal")
    }

    /// Returns the memory in the free lists (`MemFree`).
    #[must_use]
    pub fn free(&self) -> u64 {
        self.field("MemFree")
    }

    /// Returns the kernel's estimate of the memory that a process could get without swapping (`MemAvailable`).
    #[must_use]
    pub fn available(&self) -> u64 {
        self.field("MemAvailable")
    }
}

/// The minimum of `MemFree` over a number of samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemFreeMinimum {
    /// The minimum, in bytes.
    pub free: u64,
    /// The number of samples.
    pub samples: u64,
}

/// One zone's line of `/proc/buddyinfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuddyInfoZone {
    /// The number of the NUMA node.
    pub node: u32,
    /// The zone's name.
    pub name: String,
    /// The number of free blocks of each order. A free block of order n is 2^n pages.
    pub free_blocks: Vec<u64>,
}

impl BuddyInfoZone {
    /// Returns the zone's free bytes in free blocks of at least `order`.
    #[must_use]
    pub fn free_bytes_from_order(&self, order: usize, page_size: u64) -> u64 {
        let sized = self.free_blocks.iter().enumerate().skip(order);
        sized
            .map(|(order, count)| (count * page_size) << order)
            .sum()
    }
}

/// The reply to [`Fill`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    /// The number of the workload, for the other calls.
    pub workload: u32,
    /// The number of pages filled, including the kept ones.
    pub pages: u64,
    /// The number of kept pages.
    pub kept: u64,
}

/// The result of a comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The number of pages compared.
    pub pages: u64,
    /// The number of pages that did not hold their pattern.
    pub wrong: u64,
    /// The number of the first page that did not hold its pattern.
    pub first_wrong: Option<u64>,
}

/// The statistics of a churn workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChurnStats {
    /// The number of pieces mapped, files written, or children forked.
    pub pieces: u64,
    /// The number of bytes written.
    pub bytes: u64,
    /// The number of pages compared.
    pub compared: u64,
    /// The number of pages that did not hold their pattern. A forked child that finds wrong pages counts as one.
    pub wrong: u64,
}

impl std::ops::AddAssign for ChurnStats {
    fn add_assign(&mut self, other: Self) {
        self.pieces += other.pieces;
        self.bytes += other.bytes;
        self.compared += other.compared;
        self.wrong += other.wrong;
    }
}

/// The guest's pages by use, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesByUse {
    /// Pages in the allocator's free blocks, except those on per-CPU lists.
    pub free: RangeSet,
    /// Pages in a balloon.
    pub ballooned: RangeSet,
    /// Pages whose contents matter, by their flags: pages of processes, files, slab allocators and page tables, and the
    /// kernel's own.
    pub used: RangeSet,
    // All other pages have no telling flag: pages on per-CPU lists, and pages that a driver has allocated.
}

/// A balloon device, as the guest kernel sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonDevice {
    /// The device's name: `virtio1`, ...
    pub name: String,
    /// The feature bits that device and driver have negotiated. All zero without a driver.
    pub features: u64,
    /// The name of the device's driver.
    pub driver: Option<String>,
    /// Whether the driver has set `DRIVER_OK`.
    pub driver_ok: bool,
}

/// A record of the kernel log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLogRecord {
    /// The record's sequence number.
    pub sequence: u64,
    /// The record's level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// The time since boot, in microseconds.
    pub time_us: u64,
    /// The text.
    pub text: String,
}

/// The result of a system call with a failing allocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailNthResult {
    /// The error number of the system call, if it failed.
    pub error: Option<i32>,
    /// Whether an allocation failed. It did not if the call made fewer than `nth` allocations.
    pub injected: bool,
    /// The number of allocations that counted, including the failed one.
    pub allocations: u32,
}

/// The result of a program that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandOutput {
    /// The exit status; `None` if a signal ended the program.
    pub status: Option<i32>,
    /// The program's standard output.
    pub stdout: String,
    /// The program's standard error.
    pub stderr: String,
}

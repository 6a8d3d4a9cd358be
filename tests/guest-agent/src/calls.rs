// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The calls that a guest answers, and the types of their answers. Sizes are in bytes, limits in milliseconds.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ranges::RangeSet;

/// Something that the host asks of the guest.
pub trait Call: Into<AnyCall> {
    /// What the guest answers when it has done it.
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

        /// Any of the calls, as it goes over the line.
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
    /// `/proc/meminfo`.
    MemInfo -> MemInfoFields;

    /// `/proc/buddyinfo`: the free blocks of each zone.
    BuddyInfo -> Vec<BuddyInfoZone>;

    /// Waits until `MemFree` lies between two bounds. The kernel has no event for this: it is looked at every 10 ms.
    WaitMemFree {
        /// At least so many bytes free.
        at_least: u64,
        /// At most so many bytes free.
        at_most: u64,
        /// How long to wait.
        timeout_ms: u64,
    } -> MemInfoFields;

    /// Waits until `MemFree` has moved by less than `tolerance` for so many looks, one each 10 ms. Looks and not time: a guest whose
    /// processors the host does not run for a while has not settled.
    WaitMemSettled {
        /// Bytes by which it may move.
        tolerance: u64,
        /// For how many looks it must stay so.
        stable_samples: u32,
        /// How long to wait at most.
        timeout_ms: u64,
    } -> MemInfoFields;

    /// Looks at `MemFree` again and again, without a pause, and says what the least was.
    LowestMemFree {
        /// For how long.
        duration_ms: u64,
    } -> MemFreeMinimum;

    /// The pages that are in free blocks (`/proc/kpageflags`), but for those on processors' own lists.
    FreePages -> RangeSet;

    /// What the kernel uses its pages for (`/proc/kpageflags`).
    PageUse -> PagesByUse;

    /// Drops what the kernel caches, merges free blocks, and adds up what each processor has counted, so that its use of memory can
    /// be compared with another moment's. A kernel without one of these controls does without it.
    DropCachesAndCompact -> ();

    /// Starts a process that maps memory and fills every page of it with a pattern of its own.
    ///
    /// Of every `keep_every` pages in the order of their filling (hence mostly neighbours in physical memory) one is
    /// *kept* until [`Free`]; the others are given back by [`Release`]. With `keep_every` 0 none is kept, with 1 all are.
    Fill {
        /// How many bytes; rounded down to whole pages.
        bytes: u64,
        /// One page of how many is kept.
        keep_every: u64,
        /// The seed of the patterns.
        seed: u64,
    } -> Filled;

    /// Gives the pages of a workload that are not kept back to the kernel.
    Release {
        /// As [`Filled::workload`] said.
        workload: u32,
    } -> ();

    /// Gives back, of the pages of a workload that are not kept, the `pages` with the lowest physical addresses.
    ReleaseLowest {
        /// As [`Filled::workload`] said.
        workload: u32,
        /// How many.
        pages: u64,
    } -> ();

    /// Ends a workload's process, and with it all its memory.
    Free {
        /// As [`Filled::workload`] said.
        workload: u32,
    } -> ();

    /// Compares every kept page of a workload with its pattern.
    Verify {
        /// As [`Filled::workload`] said.
        workload: u32,
    } -> Verified;

    /// Where the kept pages of a workload lie in physical memory (`/proc/PID/pagemap`).
    KeptPages {
        /// As [`Filled::workload`] said.
        workload: u32,
    } -> RangeSet;

    /// Starts a process that uses memory as a busy guest does, until [`StopChurn`]: it maps pieces of memory, fills them
    /// with patterns, compares them, and unmaps them, in an order that only the seed decides.
    ChurnMemory {
        /// How many bytes it has mapped at most.
        bytes: u64,
        /// The seed of the order and the patterns.
        seed: u64,
    } -> u32;

    /// Starts a process that uses the page cache, until [`StopChurn`]: it writes files of the guest's tmpfs, overwrites parts of
    /// them, compares them with what was written (by reading and through mappings), truncates and removes them.
    ChurnFiles {
        /// How many bytes of files there are at most.
        bytes: u64,
        /// The seed of the order and the patterns.
        seed: u64,
    } -> u32;

    /// Starts a process that forks without end, until [`StopChurn`]: children compare what they share with it, write to
    /// their copies and end, while it writes to its own.
    ChurnForks {
        /// How many bytes it shares with its children.
        bytes: u64,
        /// The seed of the patterns, and of which pages are written.
        seed: u64,
    } -> u32;

    /// What such a process has done so far. It goes on.
    ChurnProgress {
        /// As the answer to [`ChurnMemory`], [`ChurnFiles`] or [`ChurnForks`] said.
        workload: u32,
    } -> ChurnStats;

    /// Ends such a process, which compares once more all that it has.
    StopChurn {
        /// As the answer to [`ChurnMemory`], [`ChurnFiles`] or [`ChurnForks`] said.
        workload: u32,
    } -> ChurnStats;

    /// The balloon devices of the guest.
    ListBalloonDevices -> Vec<BalloonDevice>;

    /// Waits until the guest has so many balloon devices, each with a driver that is ready if that is asked for. The kernel tells of them by messages that need a program to
    /// collect them; so they are looked at every 5 ms instead.
    WaitBalloonDevices {
        /// How many.
        count: usize,
        /// Whether they must have drivers.
        driver_ok: bool,
        /// How long to wait.
        timeout_ms: u64,
    } -> Vec<BalloonDevice>;

    /// Loads a module of the initramfs.
    LoadModule {
        /// Its path in the guest.
        path: String,
        /// Its parameters, as `insmod` takes them.
        parameters: String,
    } -> ();

    /// Unloads a module; fails at once if it is in use.
    UnloadModule {
        /// Its name, as `/proc/modules` has it.
        name: String,
    } -> ();

    /// The names of the modules that are loaded.
    Modules -> Vec<String>;

    /// The lines of the kernel log since the last call of this kind.
    KernelLog -> Vec<KernelLogRecord>;

    /// Waits for a line of the kernel log that holds a text, looking from the log's beginning.
    WaitKernelLog {
        /// The text.
        substring: String,
        /// Only lines with a sequence number of at least this.
        from: u64,
        /// How long to wait.
        timeout_ms: u64,
    } -> KernelLogRecord;

    /// The results of the KUnit suites that have run, by suite, in KTAP. Empty if the kernel has no KUnit.
    KunitResults -> BTreeMap<String, String>;

    /// A file of the guest, as text.
    ReadFile {
        /// Its path.
        path: String,
    } -> String;

    /// The names in a folder of the guest, sorted; none if it is not there.
    ListFolder {
        /// Its path.
        path: String,
    } -> Vec<String>;

    /// Writes to a file of the guest that exists (of `/sys` or `/proc`).
    WriteFile {
        /// Its path.
        path: String,
        /// What to write, in one system call.
        text: String,
    } -> ();

    /// As [`WriteFile`], while one allocation of the kernel's on behalf of this fails. Which allocations count is the
    /// kernel's fault injection to say (in debugfs); a kernel without it refuses.
    WriteFileFailNth {
        /// Its path.
        path: String,
        /// What to write, in one system call.
        text: String,
        /// The number of the allocation that fails, from 1.
        nth: u32,
    } -> FailNthResult;

    /// As [`LoadModule`], while one allocation of the kernel's on behalf of this fails.
    LoadModuleFailNth {
        /// Its path in the guest.
        path: String,
        /// Its parameters, as `insmod` takes them.
        parameters: String,
        /// The number of the allocation that fails, from 1.
        nth: u32,
    } -> FailNthResult;

    /// Runs a program and waits for its end. Names of busybox applets are known.
    Run {
        /// The program and its arguments.
        argv: Vec<String>,
    } -> CommandOutput;

    /// Connects a shell to the console and waits for its end.
    Shell -> ();

    /// Loads a kernel, to be started by [`KexecExec`] without the machine being reset.
    KexecLoad {
        /// Its path in the guest.
        kernel: String,
        /// The path of its initramfs in the guest.
        initramfs: String,
        /// Its command line.
        command_line: String,
    } -> ();

    /// Starts the kernel that was loaded. The answer comes before; then there is a new guest, which says hello.
    KexecExec -> ();

    /// Switches the guest off. The answer comes before.
    PowerOff -> ();
}

/// `/proc/meminfo`, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MemInfoFields(pub BTreeMap<String, u64>);

impl MemInfoFields {
    /// One field, or 0 if this kernel does not have it.
    #[must_use]
    pub fn field(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// Memory that the kernel manages.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.field("MemTotal")
    }

    /// Memory in the free lists.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.field("MemFree")
    }

    /// Memory that a process could have without swapping, by the kernel's estimate.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.field("MemAvailable")
    }
}

/// The lowest of some samples.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemFreeMinimum {
    /// Bytes that were free at the worst moment.
    pub free: u64,
    /// How often it was looked.
    pub samples: u64,
}

/// One zone's line of `/proc/buddyinfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuddyInfoZone {
    /// The node's number.
    pub node: u32,
    /// The zone's name.
    pub name: String,
    /// How many blocks of each order (a block of order n is 2^n pages) are free.
    pub free_blocks: Vec<u64>,
}

impl BuddyInfoZone {
    /// Free bytes of this zone, in blocks of at least `order`.
    #[must_use]
    pub fn free_bytes_from_order(&self, order: usize, page_size: u64) -> u64 {
        let sized = self.free_blocks.iter().enumerate().skip(order);
        sized
            .map(|(order, count)| (count * page_size) << order)
            .sum()
    }
}

/// What a workload filled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    /// Its number, for the other calls.
    pub workload: u32,
    /// Pages filled, kept ones included.
    pub pages: u64,
    /// Pages kept.
    pub kept: u64,
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Pages compared.
    pub pages: u64,
    /// Pages that did not hold their pattern.
    pub wrong: u64,
    /// The number of the first of these.
    pub first_wrong: Option<u64>,
}

/// What a process that used memory has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChurnStats {
    /// Pieces mapped, files written or children forked, and filled.
    pub pieces: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Pages compared.
    pub compared: u64,
    /// Pages that did not hold their pattern.
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

/// The guest's pages at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesByUse {
    /// In the allocator's free blocks, but for those on processors' own lists.
    pub free: RangeSet,
    /// In a balloon.
    pub ballooned: RangeSet,
    /// With contents that somebody relies on, as their flags show: of processes, of files, of the slab allocators, page
    /// tables, the kernel's own.
    pub used: RangeSet,
    // The rest has no flag that tells: processors' lists of free pages, and whatever a driver has taken for itself.
}

/// A balloon device, as the guest's kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonDevice {
    /// Its name: `virtio1`, ...
    pub name: String,
    /// The feature bits that it and its driver have agreed on; all zero without a driver.
    pub features: u64,
    /// The name of its driver.
    pub driver: Option<String>,
    /// Whether the driver has said that it is ready (`DRIVER_OK`).
    pub driver_ok: bool,
}

/// A record of the kernel log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLogRecord {
    /// The record's number.
    pub sequence: u64,
    /// Its level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Microseconds since boot.
    pub time_us: u64,
    /// The text.
    pub text: String,
}

/// What became of a system call in which an allocation was to fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailNthResult {
    /// The error number that it returned, if it failed.
    pub error: Option<i32>,
    /// Whether there were so many allocations that one failed.
    pub injected: bool,
    /// How many allocations counted, the one that failed included.
    pub allocations: u32,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandOutput {
    /// Its exit status; absent if a signal ended it.
    pub status: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

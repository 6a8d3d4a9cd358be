// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! SIGBUS in the mappings of guest memory.
//!
//! A front end may truncate its memory file at any time. An access beyond the end of the file then raises SIGBUS, whose
//! default action ends the program. [`GuestMappings`] lists the mappings of guest memory in a table. The handler of
//! SIGBUS replaces the page of a fault in one of them by a page of zeros, records the fault, and wakes the owner of the
//! mapping, who ends the session. A SIGBUS anywhere else keeps its previous action. A SIGBUS that a process sends ends
//! this one.
//!
//! The handler runs in the middle of any statement of any thread. It takes no lock, allocates nothing, and uses only
//! atomics and system calls.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{fence, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::event::EventNotifier;

use crate::sync::lock;

/// The most mappings of guest memory in this process. A front end has at most 509 regions, and twice as many for the
/// time of a change.
const MAX_MAPPINGS: usize = 4096;

/// A mapping of guest memory in the table of the handler.
///
/// `sequence` is even while the other fields are constant. A slot is free if `end` is 0.
struct Slot {
    sequence: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes of a page of the mapping.
    page: AtomicUsize,
    /// The event descriptor that wakes the owner, or -1.
    wake: AtomicI32,
    /// The offset of the last fault in the mapping, plus 1. 0 if there was none.
    fault: AtomicUsize,
}

impl Slot {
    /// Returns a free slot.
    const fn new() -> Self {
        Self {
            sequence: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            wake: AtomicI32::new(-1),
            fault: AtomicUsize::new(0),
        }
    }

    /// Changes the slot by `change` if it is free. Returns whether it was.
    fn claim(&self, change: impl FnOnce(&Self)) -> bool {
        let sequence = self.sequence.load(Ordering::Relaxed);
        if sequence % 2 == 1 || self.end.load(Ordering::Relaxed) != 0 {
            return false;
        }
        let taken = self.sequence.compare_exchange(
            sequence,
            sequence.wrapping_add(1),
            Ordering::Acquire,
            Ordering::Relaxed,
        );
        if taken.is_err() {
            return false;
        }
        // Another thread may have used and freed the slot meanwhile, which changes the sequence. So it is still free.
        fence(Ordering::Release);
        change(self);
        self.sequence
            .store(sequence.wrapping_add(2), Ordering::Release);
        true
    }

    /// Frees the slot. Only its owner may call this.
    fn free(&self) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence
            .store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.end.store(0, Ordering::Relaxed);
        self.sequence
            .store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// Returns start and length of the page at `address`, and the event descriptor, if `address` is in this mapping.
    fn find(&self, address: usize) -> Option<(usize, usize, i32)> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let (start, end) = (
            self.start.load(Ordering::Relaxed),
            self.end.load(Ordering::Relaxed),
        );
        let (page, wake) = (
            self.page.load(Ordering::Relaxed),
            self.wake.load(Ordering::Relaxed),
        );
        fence(Ordering::Acquire);
        let constant = sequence % 2 == 0 && self.sequence.load(Ordering::Relaxed) == sequence;
        if !constant || address < start || address >= end {
            return None;
        }
        let offset = (address - start).checked_div(page)? * page;
        Some((start + offset, page.min(end - start - offset), wake))
    }
}

static SLOTS: [Slot; MAX_MAPPINGS] = [const { Slot::new() }; MAX_MAPPINGS];

/// The action of SIGBUS before [`install`].
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// The mappings of guest memory, in which a SIGBUS does not end the program.
pub struct GuestMappings {
    /// The slots of the mappings. They are free before `memory` is unmapped.
    slots: Vec<(u64, &'static Slot)>,
    memory: Arc<GuestMemoryMmap>,
    /// Kept open while a slot has its number.
    wake_owner: Option<EventNotifier>,
}

impl std::fmt::Debug for GuestMappings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMappings")
            .field("mappings", &self.slots.len())
            .finish_non_exhaustive()
    }
}

impl GuestMappings {
    /// Enters the mappings of `memory` into the table of the handler of SIGBUS, and installs the handler. `page` returns
    /// the bytes of a page of the region at a guest physical address. The handler writes to the event descriptor `wake`.
    ///
    /// # Errors
    ///
    /// If the table is full, or the handler cannot be installed.
    pub fn new(
        memory: Arc<GuestMemoryMmap>,
        page: impl Fn(u64) -> u64,
        wake: Option<EventNotifier>,
    ) -> io::Result<Self> {
        install()?;
        let mut mappings = Self {
            slots: Vec::new(),
            memory,
            wake_owner: wake,
        };
        let wake = mappings.wake_owner.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        for region in mappings.memory.iter() {
            let address = region.start_addr().raw_value();
            let start = region.as_ptr() as usize;
            let page = usize::try_from(page(address)).unwrap_or(usize::MAX);
            let fill = |slot: &Slot| {
                slot.start.store(start, Ordering::Relaxed);
                slot.end
                    .store(start.saturating_add(region.size()), Ordering::Relaxed);
                slot.page.store(page, Ordering::Relaxed);
                slot.wake.store(wake, Ordering::Relaxed);
                slot.fault.store(0, Ordering::Relaxed);
            };
            let slot = SLOTS.iter().find(|slot| slot.claim(fill));
            let slot = slot.ok_or_else(|| {
                io::Error::other(format!("more than {MAX_MAPPINGS} regions of guest memory"))
            })?;
            mappings.slots.push((address, slot));
        }
        Ok(mappings)
    }

    /// Returns whether these are the mappings of `memory`.
    pub fn are_of(&self, memory: &GuestMemoryMmap) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.memory), memory)
    }

    /// Returns the guest physical address of the last fault, if there was one.
    pub fn fault(&self) -> Option<u64> {
        self.slots.iter().find_map(|(address, slot)| {
            let offset = slot.fault.load(Ordering::Acquire).checked_sub(1)?;
            Some(address.saturating_add(offset as u64))
        })
    }
}

impl Drop for GuestMappings {
    fn drop(&mut self) {
        for (_, slot) in self.slots.drain(..) {
            slot.free();
        }
    }
}

/// Installs the handler of SIGBUS, once.
fn install() -> io::Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = lock(&INSTALLED);
    if *installed {
        return Ok(());
    }
    // SAFETY: `sigaction` is a C structure of integers and an optional function, for which all zeros are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: As above.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: With no new action the call only writes the current one to `previous`, which is valid for it.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Before the handler runs, which reads it. Fails only after an attempt that failed below, with the same value.
    let _ = PREVIOUS.set(previous);
    action.sa_sigaction = handle_sigbus as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `action` is valid, has an empty mask, and `handle_sigbus` has the type that SA_SIGINFO requires and calls
    // only functions that are async-signal-safe.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    *installed = true;
    Ok(())
}

extern "C" fn handle_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: `__errno_location` returns the address of this thread's `errno`, which is always valid.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: As above.
    let before = unsafe { *errno };
    // SAFETY: The kernel passes a valid `info`. For a positive code, which only the kernel sends, it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code <= 0 {
        // A process has sent the signal, so it has no address.
        end_process(signal);
    } else if !SLOTS.iter().any(|slot| resolve(slot, address)) {
        restore_previous_action(signal);
    }
    // SAFETY: As above.
    unsafe { *errno = before };
}

/// Replaces the page at `address` by zeros, if it is in the mapping of `slot`. Returns whether it was replaced.
fn resolve(slot: &Slot, address: usize) -> bool {
    let Some((start, length, wake)) = slot.find(address) else {
        return false;
    };
    // SAFETY: The range is inside a mapping that this process owns: `GuestMappings` keeps it mapped while the slot is
    // in use, and the faulting access proves that this thread still uses it. Guest memory is accessed only as volatile
    // bytes of any value, so that the replacement breaks no assumption.
    let page = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return false;
    }
    let offset = address.saturating_sub(slot.start.load(Ordering::Relaxed));
    slot.fault
        .store(offset.saturating_add(1), Ordering::Release);
    if wake >= 0 {
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is valid for reads of its length. The owner of the slot keeps the descriptor open. A full event
        // descriptor has already woken the owner, so that errors do not matter.
        unsafe { libc::write(wake, one.as_ptr().cast(), one.len()) };
    }
    true
}

/// Restores the action of before [`install`]. A faulting instruction is executed again, and faults again.
fn restore_previous_action(signal: libc::c_int) {
    let Some(previous) = PREVIOUS.get() else {
        return;
    };
    // SAFETY: `previous` is an action that the kernel reported for this signal.
    unsafe { libc::sigaction(signal, previous, std::ptr::null_mut()) };
}

/// Ends this process by the signal. The previous action would not: that of the Rust library only removes itself, and
/// this process would continue without a handler.
fn end_process(signal: libc::c_int) {
    // SAFETY: `signal` and `raise` have no preconditions, and no other code of this process depends on the action. The
    // signal is blocked here, and is delivered when the handler returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use rustix::fs::ftruncate;
    use vm_memory::{Bytes, FileOffset, GuestAddress};
    use vmm_sys_util::event::{new_event_consumer_and_notifier, EventFlag};

    use super::*;
    use crate::memory::tests::memfd;

    fn mapped(file: &File, length: usize) -> Arc<GuestMemoryMmap> {
        let file = FileOffset::new(file.try_clone().unwrap(), 0);
        let range = (GuestAddress(0x10_0000), length, Some(file));
        Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap())
    }

    #[test]
    fn a_fault_in_a_truncated_file_reads_zeros_and_wakes_the_owner() {
        let file = memfd(0x4000);
        let memory = mapped(&file, 0x4000);
        memory
            .write_slice(&[0x5a; 0x4000], GuestAddress(0x10_0000))
            .unwrap();
        let (woken, wake) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
        let mappings = GuestMappings::new(memory.clone(), |_| 0x1000, Some(wake)).unwrap();
        assert!(mappings.are_of(&memory));
        assert_eq!(mappings.fault(), None);
        ftruncate(&file, 0x1000).unwrap();
        let read = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!(read(0x10_0fff), 0x5a);
        assert_eq!(mappings.fault(), None);
        assert!(woken.consume().is_err());
        assert_eq!(read(0x10_2010), 0);
        assert_eq!(mappings.fault(), Some(0x10_2010));
        // Writes go to the page of zeros as well.
        memory.write_obj(7u8, GuestAddress(0x10_3000)).unwrap();
        assert_eq!(read(0x10_3000), 7);
        assert_eq!(mappings.fault(), Some(0x10_3000));
        woken.consume().unwrap();
    }

    #[test]
    fn slots_are_used_again() {
        let file = memfd(0x1000);
        for _ in 0..2 * MAX_MAPPINGS {
            let mappings = GuestMappings::new(mapped(&file, 0x1000), |_| 0x1000, None).unwrap();
            assert_eq!(mappings.fault(), None);
        }
    }

    /// Maps the whole file with `flags`, and writes to it.
    fn map(file: &File, length: usize, flags: libc::c_int) -> *mut u8 {
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: A new mapping at an address that the kernel chooses.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        // SAFETY: The mapping is `length` bytes long, and nothing else refers to it.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0x5a, length) };
        address.cast()
    }

    fn unmap(address: *mut u8, length: usize) {
        // SAFETY: `address` and `length` are those of a mapping that is not used any longer.
        assert_eq!(unsafe { libc::munmap(address.cast(), length) }, 0);
    }

    /// Set for a process that [`ends_by_sigbus`] starts.
    const CHILD: &str = "VHOST_DEVICE_BALLOON_TEST_FAULT";

    #[test]
    fn a_fault_outside_guest_memory_keeps_its_action() {
        ends_by_sigbus("memory::sys::tests::faults_outside_guest_memory");
    }

    #[test]
    fn a_signal_that_is_sent_ends_the_process() {
        ends_by_sigbus("memory::sys::tests::sends_itself_the_signal");
    }

    /// Runs a test in a process of its own, and checks that SIGBUS ends the process.
    fn ends_by_sigbus(test: &str) {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test])
            .env(CHILD, "1")
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }

    #[test]
    fn sends_itself_the_signal() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        const LENGTH: usize = 0x4000;
        let guest = mapped(&memfd(LENGTH as u64), LENGTH);
        let _mappings = GuestMappings::new(guest, |_| 0x1000, None).unwrap();
        // SAFETY: `raise` has no preconditions. The signal ends this process.
        unsafe { libc::raise(libc::SIGBUS) };
    }

    #[test]
    fn faults_outside_guest_memory() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        const LENGTH: usize = 0x4000;
        let guest = mapped(&memfd(LENGTH as u64), LENGTH);
        let _mappings = GuestMappings::new(guest, |_| 0x1000, None).unwrap();
        let file = memfd(LENGTH as u64);
        let address = map(&file, LENGTH, libc::MAP_SHARED);
        ftruncate(&file, 0).unwrap();
        // SAFETY: The byte is mapped. The access raises SIGBUS, which ends this process.
        unsafe { address.read_volatile() };
    }

    #[test]
    fn locked_memory_is_released_and_stays_free_until_it_is_written() {
        const LENGTH: usize = 0x1_0000;
        let file = memfd(LENGTH as u64);
        let address = map(&file, LENGTH, libc::MAP_SHARED);
        // SAFETY: The range is mapped.
        let locked = unsafe { libc::mlock(address.cast(), LENGTH) };
        if locked != 0 {
            println!("skipped: {}", io::Error::last_os_error());
            return unmap(address, LENGTH);
        }
        let mut ram = crate::memory::Ram::new(&mapped(&file, LENGTH));
        assert_eq!(ram.release(0x10_0000..0x10_8000).unwrap(), 0x8000);
        assert_eq!(ram.allocated().unwrap().total, 0x8000);
        // SAFETY: The byte is mapped.
        unsafe { address.write_volatile(1) };
        assert_eq!(ram.allocated().unwrap().total, 0x9000);
        unmap(address, LENGTH);
    }

    #[test]
    fn a_private_copy_outlives_its_page_in_the_file() {
        const LENGTH: usize = 0x4000;
        let file = memfd(LENGTH as u64);
        let address = map(&file, LENGTH, libc::MAP_PRIVATE);
        let memory = mapped(&file, LENGTH);
        memory
            .write_slice(&[0x77; LENGTH], GuestAddress(0x10_0000))
            .unwrap();
        let mut ram = crate::memory::Ram::new(&memory);
        assert_eq!(ram.release(0x10_0000..0x10_4000).unwrap(), 0x4000);
        assert_eq!(ram.allocated().unwrap().total, 0);
        // SAFETY: The byte is mapped.
        assert_eq!(unsafe { address.read_volatile() }, 0x5a);
        unmap(address, LENGTH);
    }
}

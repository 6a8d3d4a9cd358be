// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Target `queues`: a driver that writes anything into its rings, descriptor tables and memory.
//!
//! The target checks that each kick comes to an end, that the device changes nothing in guest memory but the used ring
//! and the pages that it releases, that the dirty bitmap agrees with the hints, and that the device afterwards serves an
//! honest driver.

use std::ops::Range;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use shared_abi::queue::Queue;
use vhost_device_balloon::vring::NotificationSuppression;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::guest::{
    device, ignore, rest_of, write, FeatureByte, Guest, FREE, LENGTH, PAGE, SECOND, SECOND_LENGTH,
    START,
};

/// The most steps of one input.
const STEPS: usize = 48;

#[derive(Arbitrary, Debug)]
enum Address {
    /// A page that the driver does not use.
    Free(u8),
    /// An address near the start or the end of a region.
    Edge(u8, i16),
    /// An address in the first region: rings, tables or free pages.
    First(u32),
    Any(u64),
}

impl Address {
    fn resolve(&self) -> u64 {
        match *self {
            Self::Free(page) => FREE + u64::from(page % 16) * PAGE,
            Self::Edge(edge, offset) => {
                let edges = [START, START + LENGTH, SECOND, SECOND + SECOND_LENGTH];
                edges[usize::from(edge % 4)].wrapping_add_signed(offset.into())
            }
            Self::First(offset) => START + u64::from(offset) % LENGTH,
            Self::Any(address) => address,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Length {
    Small(u8),
    Pages(u8),
    Any(u32),
}

impl Length {
    fn resolve(&self) -> u32 {
        match *self {
            Self::Small(length) => length.into(),
            Self::Pages(pages) => u32::from(pages) * PAGE as u32,
            Self::Any(length) => length,
        }
    }
}

#[derive(Arbitrary, Debug)]
enum CmdId {
    Current,
    Stop,
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Writes a descriptor.
    Describe(u8, u8, Address, Length, u8, u8),
    /// Writes bytes anywhere.
    Write(Address, Vec<u8>),
    /// Makes a chain available.
    Offer(u8, u8),
    /// Writes the available index.
    AvailableIndex(u8, u16),
    /// Sends a chain as a correct driver would: (address, length, device-writable).
    Send(u8, Vec<(Address, Length, bool)>),
    /// Sends page frame numbers.
    Pfns(bool, Vec<u32>),
    CmdId(CmdId),
    Kick(u8),
    StartHinting,
    SyncHinting,
    StopHinting,
    FinishHinting,
    RequestStats,
    WriteConfig(u8, Vec<u8>),
    /// Another driver, with other features and queues of another size.
    Restart(FeatureByte, u8),
    /// Stops or starts a queue.
    Enable(u8, bool),
    /// Sets the next available index, as a front end does after a pause.
    NextAvailable(u8, u16),
    Reset,
    /// Gives a queue one turn, which may leave a request to later turns.
    Turn(u8),
    /// Stops a queue, as a front end does: the device serves the request that it has taken.
    Stop(u8),
    /// Starts a queue that was stopped.
    Start(u8),
    /// Sends page frame numbers that do not adjoin, from the first one on: several turns of work.
    ManyPfns(bool, u32, u16),
    InhibitDiscard(bool),
}

pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    // An input that is too short has few steps.
    let _ = play(&mut input);
}

fn play(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let offered = FeatureByte::arbitrary(input)?.features();
    let accepted = FeatureByte::arbitrary(input)?.features();
    let suppression = match u8::arbitrary(input)? % 3 {
        0 => NotificationSuppression::EventIdx,
        1 => NotificationSuppression::Flag,
        _ => NotificationSuppression::Never,
    };
    let device = device(offered, Arc::default()).with_suppression(suppression);
    let mut guest = Guest::new(device);
    guest.start_driver(accepted, 16);
    for vring in &guest.vrings {
        vring.set_queue_event_idx(suppression == NotificationSuppression::EventIdx);
    }
    for step in rest_of::<Step>(input, STEPS) {
        step.play(&mut guest);
        guest.free_retired();
    }
    check_bitmap(&guest);
    guest.check_honest_driver();
    Ok(())
}

impl Step {
    fn play(self, guest: &mut Guest) {
        let memory = guest.memory.memory();
        let count = Queue::MAX_COUNT as u8;
        let index = |number: u8| usize::from(number % count);
        match self {
            Self::Describe(queue, at, address, length, flags, next) => {
                let descriptor = (
                    address.resolve(),
                    length.resolve(),
                    u16::from(flags & 7),
                    next.into(),
                );
                guest.queues[index(queue)].describe(&memory, at.into(), descriptor);
            }
            Self::Write(address, bytes) => write(&memory, address.resolve(), &bytes),
            Self::Offer(queue, head) => guest.queues[index(queue)].offer(&memory, head.into()),
            Self::AvailableIndex(queue, value) => {
                let queue = &mut guest.queues[index(queue)];
                queue.added = value;
                write(&memory, queue.available() + 2, &value.to_le_bytes());
            }
            Self::Send(queue, segments) => {
                let segments: Vec<_> = segments
                    .iter()
                    .map(|(address, length, writable)| {
                        (address.resolve(), length.resolve(), *writable)
                    })
                    .collect();
                let at = index(queue);
                let queue = guest.queues[at];
                for (number, (address, length, writable)) in
                    (0..queue.size).zip(segments.iter().copied())
                {
                    let last = usize::from(number) + 1 >= segments.len();
                    let flags = u16::from(!last) | u16::from(writable) << 1;
                    queue.describe(&memory, number, (address, length, flags, number + 1));
                }
                guest.queues[at].offer(&memory, 0);
                kick(guest, at);
            }
            Self::Pfns(inflate, pfns) => {
                let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
                let queue = usize::from(!inflate);
                send_bytes(guest, queue, &bytes);
            }
            Self::CmdId(id) => {
                let Some(queue) = Queue::FreePage.index(guest.features) else {
                    return;
                };
                let number = match id {
                    CmdId::Current => {
                        let status = guest.device.hinting_status();
                        status.id.map_or(0, |id| id.number())
                    }
                    CmdId::Stop => 0,
                    CmdId::Any(number) => number,
                };
                send_bytes(guest, queue, &number.to_le_bytes());
            }
            Self::Kick(queue) => kick(guest, index(queue)),
            Self::StartHinting => ignore(guest.device.start_hinting()),
            Self::SyncHinting => ignore(guest.device.sync_hinting()),
            Self::StopHinting => guest.device.stop_hinting(),
            Self::FinishHinting => guest.device.finish_hinting(),
            Self::RequestStats => ignore(guest.device.request_stats()),
            Self::WriteConfig(offset, bytes) => guest.device.write_config(offset.into(), &bytes),
            Self::Restart(features, size) => {
                guest.start_driver(features.features(), 1 << (size % 9));
            }
            Self::Enable(queue, enabled) => guest.vrings[index(queue)].set_enabled(enabled),
            Self::NextAvailable(queue, value) => {
                guest.vrings[index(queue)].set_queue_next_avail(value);
            }
            Self::Reset => guest.device.reset(),
            Self::Turn(queue) => {
                let at = index(queue);
                watch(guest, at, |guest| {
                    ignore(guest.device.handle_queue(at, &guest.vrings));
                    guest.free_retired();
                });
            }
            Self::Stop(queue) => {
                let at = index(queue);
                guest.vrings[at].set_queue_ready(false);
                watch(guest, at, |guest| guest.finish_request(at));
            }
            Self::Start(queue) => guest.vrings[index(queue)].set_queue_ready(true),
            Self::ManyPfns(inflate, first, count) => {
                let most = SECOND_LENGTH as u32 / 4;
                let pfns = (0..u32::from(count) % most).map(|at| first.wrapping_add(2 * at));
                let bytes: Vec<u8> = pfns.flat_map(u32::to_le_bytes).collect();
                let at = usize::from(!inflate);
                write(&memory, SECOND, &bytes);
                let length = bytes.len() as u32;
                guest.queues[at].describe(&memory, 0, (SECOND, length, 0, 0));
                guest.queues[at].offer(&memory, 0);
                let turn = |guest: &mut Guest| {
                    ignore(guest.device.handle_queue(at, &guest.vrings));
                };
                watch(guest, at, turn);
            }
            Self::InhibitDiscard(inhibit) => guest.device.inhibit_discard(inhibit),
        }
    }
}

fn send_bytes(guest: &mut Guest, queue: usize, bytes: &[u8]) {
    let memory = guest.memory.memory();
    write(&memory, crate::guest::SCRATCH, bytes);
    let length = bytes.len() as u32;
    guest.queues[queue].describe(&memory, 0, (crate::guest::SCRATCH, length, 0, 0));
    guest.queues[queue].offer(&memory, 0);
    kick(guest, queue);
}

/// Kicks a queue, and checks what the device has changed in guest memory.
fn kick(guest: &mut Guest, index: usize) {
    watch(guest, index, |guest| guest.kick(index));
}

/// Gives the queue `index` turns by `action`, and checks what the device has changed in guest memory.
fn watch(guest: &mut Guest, index: usize, action: impl FnOnce(&mut Guest)) {
    let before = snapshot(guest);
    let released = released_bytes(guest);
    action(guest);
    let after = snapshot(guest);
    let pages_released = (released_bytes(guest) - released) / PAGE;
    let queue = guest.queues[index];
    let used = queue.used()..queue.used() + queue.used_length();
    let mut zeroed = 0;
    for (at, (old, new)) in before
        .chunks(PAGE as usize)
        .zip(after.chunks(PAGE as usize))
        .enumerate()
    {
        if old == new {
            continue;
        }
        let page = START + at as u64 * PAGE;
        let outside = |offset: usize| !used.contains(&(page + offset as u64));
        let rest = |bytes: &[u8]| -> Vec<u8> {
            let kept = bytes.iter().enumerate().filter(|(at, _)| outside(*at));
            kept.map(|(_, byte)| *byte).collect()
        };
        let (old, new) = (rest(old), rest(new));
        if old == new {
            continue;
        }
        assert!(
            new.iter().all(|byte| *byte == 0),
            "the device changed page {at} of guest memory"
        );
        zeroed += 1;
    }
    assert!(
        zeroed <= pages_released,
        "{zeroed} pages are zero, {pages_released} were released"
    );
    check_bitmap(guest);
}

/// Returns guest memory: the first region, then the second.
fn snapshot(guest: &Guest) -> Vec<u8> {
    let memory = guest.memory.memory();
    let mut bytes = vec![0; (LENGTH + SECOND_LENGTH) as usize];
    let (first, second) = bytes.split_at_mut(LENGTH as usize);
    for (part, start) in [(first, START), (second, SECOND)] {
        memory
            .read_slice(part, GuestAddress(start))
            .expect("guest memory can be read");
    }
    bytes
}

/// Returns how many bytes the device has released and discarded.
fn released_bytes(guest: &Guest) -> u64 {
    let status = guest.device.virtio_status();
    status.bytes_released + status.bytes_reported + guest.device.hinting_status().bytes_discarded
}

/// Checks the dirty bitmap against the hinted ranges (R12), and that config space is the device's.
fn check_bitmap(guest: &Guest) {
    let status = guest.device.hinting_status();
    let ranges = guest.hinted_ranges();
    let clean: u64 = ranges.iter().map(|(_, length)| length / PAGE).sum();
    assert_eq!(status.pages_total - status.pages_dirty, clean);
    let inside = |range: Range<u64>| {
        let within = |start, length| range.start >= start && range.end <= start + length;
        within(START, LENGTH) || within(SECOND, SECOND_LENGTH)
    };
    for (start, length) in ranges {
        assert!(inside(start..start + length), "{start:#x}+{length:#x}");
    }
}

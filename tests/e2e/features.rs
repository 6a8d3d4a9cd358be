// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tests our driver with devices that offer different features.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{anyhow, ensure, Context, Result};
use harness::artifacts::Artifacts;
use harness::guest::{Builder, Device, Driver, Guest};
use harness::vmm::Vmm;
use harness::MIB;
use shared_abi::features::Features;

const MEMORY: u64 = 256 * MIB;

/// The balloon features of the specification.
const FEATURES: [Features; 6] = [
    Features::MUST_TELL_HOST,
    Features::STATS_VQ,
    Features::DEFLATE_ON_OOM,
    Features::FREE_PAGE_HINT,
    Features::PAGE_POISON,
    Features::REPORTING,
];

/// Whether the guest's kernel clears the pages that it frees (`init_on_free`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InitOnFree {
    Off,
    On,
}

impl InitOnFree {
    fn arguments(self) -> &'static str {
        // With `init_on_alloc` the kernel writes to the blocks that the driver allocates for hints: see
        // interoperability.rs.
        match self {
            Self::Off => "init_on_alloc=0",
            Self::On => "init_on_alloc=0 init_on_free=1",
        }
    }

    /// Returns the features of `offer` that our driver accepts.
    fn accepted_features(self, offer: Features) -> Features {
        match self {
            Self::Off => offer.without(Features::PAGE_POISON),
            // Without PAGE_POISON the device does not know the fill value of free pages, so it must not discard them.
            Self::On if !offer.contains(Features::PAGE_POISON) => {
                offer.without(Features::REPORTING)
            }
            Self::On => offer,
        }
    }
}

/// Returns the balloon features among `features`, without those of the ring and the transport.
fn of_balloon(features: Features) -> Features {
    let known = FEATURES
        .into_iter()
        .fold(Features::NONE, |all, one| all | one);
    features & known
}

/// Loads our driver, exercises all negotiated features, and unloads it. Returns the negotiated features.
fn try_offer(guest: &mut Guest, offer: Features, init_on_free: InitOnFree) -> Result<Features> {
    let before = guest.settled_memory_usage()?;
    guest.load(Driver::Ours)?;
    let agreed = guest.exercise()?;
    ensure!(
        of_balloon(agreed) == init_on_free.accepted_features(offer),
        "the driver took {}, not {}",
        of_balloon(agreed),
        init_on_free.accepted_features(offer)
    );
    guest.unload(Driver::Ours)?;
    guest.check_memory_and_log(before)?;
    Ok(agreed)
}

/// Tries every subset of the features, with and without `init_on_free`.
#[test]
fn our_driver_takes_any_offer_of_our_device_in_user_mode_linux() -> Result<()> {
    /// The number of guests that run in parallel. A guest mostly waits for the kernel's own timers.
    const AT_ONCE: usize = 4;
    let then = Instant::now();
    let all = FEATURES
        .into_iter()
        .fold(Features::NONE, |all, one| all | one);
    let subsets: Vec<(Features, InitOnFree)> = (0..1 << FEATURES.len())
        .map(Features::from_bits)
        .flat_map(|offer| [(offer, InitOnFree::Off), (offer, InitOnFree::On)])
        // `init_on_free` matters only to these features.
        .filter(|(offer, init_on_free)| {
            let differs = Features::PAGE_POISON | Features::REPORTING;
            *init_on_free == InitOnFree::Off || !(*offer & differs).is_empty()
        })
        // The debug kernel is slow, so it gets only the offers that the guest in QEMU gets.
        .filter(|(offer, _)| !Vmm::is_debug_only() || offers(all).contains(offer))
        .collect();
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some((offer, init_on_free)) = subsets.get(next.fetch_add(1, Ordering::Relaxed)) {
            boot_and_try(*offer, *init_on_free)
                .with_context(|| format!("{init_on_free:?} kernel, the offer is [{offer}]"))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let ended = workers.into_iter().map(|worker| {
            let ended = worker.join();
            ended.map_err(|_| anyhow!("a thread panicked"))?
        });
        ended.collect::<Result<()>>()
    })?;
    println!("{} guests in {:?}", subsets.len(), then.elapsed());
    Ok(())
}

fn boot_and_try(offer: Features, init_on_free: InitOnFree) -> Result<()> {
    let artifacts = Artifacts::load()?;
    let names: Vec<_> = offer.names().collect();
    let mut guest = Builder::new(&artifacts, Vmm::Uml)
        .memory(MEMORY)
        .features(&names)
        .kernel_arguments(init_on_free.arguments())
        .boot()?;
    guest.set_short_reporting_delay()?;
    try_offer(&mut guest, offer, init_on_free)?;
    guest.power_off()?;
    Ok(())
}

/// Boots a guest in QEMU with an empty hotplug slot.
pub(crate) fn machine(init_on_free: InitOnFree) -> Result<Guest> {
    let artifacts = Artifacts::load()?;
    let mut guest = Builder::new(&artifacts, Vmm::Qemu)
        .memory(MEMORY)
        .device(Device::None)
        .hotplug_slot()
        .kernel_arguments(init_on_free.arguments())
        .boot()?;
    guest.set_short_reporting_delay()?;
    Ok(guest)
}

/// Returns the offers to try: all features, all without each single one, and none.
fn offers(all: Features) -> Vec<Features> {
    let offered = FEATURES.into_iter().filter(|one| all.contains(*one));
    let mut offers = vec![all];
    offers.extend(offered.map(|one| all.without(one)));
    offers.push(Features::NONE);
    offers
}

#[test]
fn our_driver_takes_what_our_device_offers_in_qemu() -> Result<()> {
    let all = FEATURES
        .into_iter()
        .fold(Features::NONE, |all, one| all | one);
    for init_on_free in [InitOnFree::Off, InitOnFree::On] {
        let mut guest = machine(init_on_free)?;
        for offer in offers(all) {
            let then = Instant::now();
            let names: Vec<_> = offer.names().collect();
            guest.plug(Device::Ours, &names, &[])?;
            try_offer(&mut guest, offer, init_on_free)
                .and_then(|_| guest.unplug())
                .with_context(|| format!("{init_on_free:?} kernel, the offer is [{offer}]"))?;
            println!("{init_on_free:?} [{offer}]: {:?}", then.elapsed());
        }
        guest.power_off()?;
    }
    Ok(())
}

/// The features that QEMU's own device has a property for. The device always or never offers the others.
const PROPERTIES: [(Features, &str); 4] = [
    (Features::DEFLATE_ON_OOM, "deflate-on-oom"),
    (Features::FREE_PAGE_HINT, "free-page-hint"),
    (Features::PAGE_POISON, "page-poison"),
    (Features::REPORTING, "free-page-reporting"),
];

/// Returns the properties with which QEMU's own device offers exactly the features in `offer`.
fn qemu_options(offer: Features) -> Vec<String> {
    let option = |(feature, name)| {
        let value = if offer.contains(feature) { "on" } else { "off" };
        format!("{name}={value}")
    };
    PROPERTIES.map(option).to_vec()
}

pub(crate) fn plug_and_try(
    guest: &mut Guest,
    offer: Features,
    init_on_free: InitOnFree,
    more: &[&str],
) -> Result<Features> {
    let then = Instant::now();
    // QEMU's device always offers statistics.
    let offer = offer | Features::STATS_VQ;
    let options = qemu_options(offer);
    let options: Vec<&str> = options
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied())
        .collect();
    guest.plug(Device::QemuOwn, &[], &options)?;
    let agreed = try_offer(guest, offer, init_on_free)
        .and_then(|agreed| guest.unplug().map(|()| agreed))
        .with_context(|| format!("{init_on_free:?} kernel, {options:?}"))?;
    println!("{init_on_free:?} {options:?}: {:?}", then.elapsed());
    Ok(agreed)
}

/// Returns all features that QEMU's device has a property for.
pub(crate) fn all_of_qemu() -> Features {
    let all = PROPERTIES.map(|(feature, _)| feature).into_iter();
    all.fold(Features::NONE, |all, one| all | one)
}

#[test]
fn our_driver_takes_what_qemus_device_offers() -> Result<()> {
    for init_on_free in [InitOnFree::Off, InitOnFree::On] {
        let mut guest = machine(init_on_free)?;
        for offer in offers(all_of_qemu()) {
            plug_and_try(&mut guest, offer, init_on_free, &[])?;
        }
        guest.power_off()?;
    }
    Ok(())
}

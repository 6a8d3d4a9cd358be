// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Inhibits that memory is released or discarded.
//!
//! The balloon still answers all requests, but the host frees nothing, and the content of memory does not change. That is
//! needed while a device has pinned guest memory, and while a VMM takes a snapshot or populates memory in post-copy.

use guest_migration::Pinning;
use tracing::{info, warn};

use super::discard_inhibition::{DiscardInhibition, DiscardStatus, PinnedBy};
use super::Device;

impl Device {
    /// Inhibits that memory is released or discarded, or allows it again. Memory that came into the balloon meanwhile stays
    /// allocated.
    pub fn inhibit_discard(&mut self, inhibit: bool) {
        self.change_inhibition(|inhibition| inhibition.by_user = inhibit);
    }

    /// Returns whether memory is released, and why not.
    pub fn discard_status(&self) -> DiscardStatus {
        let inhibition = &self.discard_inhibition;
        let by_user = inhibition
            .by_user
            .then(|| "inhibited by --inhibit-discard or inhibit-discard".to_owned());
        let reasons: Vec<_> = by_user
            .into_iter()
            .chain(inhibition.pinned_by.iter().map(|it| it.reason.clone()))
            .collect();
        DiscardStatus {
            is_inhibited: !reasons.is_empty(),
            reasons,
        }
    }

    pub(super) fn is_discard_inhibited(&self) -> bool {
        self.discard_inhibition.by_user || self.discard_inhibition.pinned_by.is_some()
    }

    /// Never searches other processes for devices that pin guest memory. [`Device::set_pinning`] still sets what a program
    /// knows that contains the device.
    #[must_use]
    pub fn without_pin_search(mut self) -> Self {
        self.discard_inhibition.is_search_off = true;
        self
    }

    /// Returns whether the device searches other processes for devices that pin guest memory.
    pub fn searches_for_pins(&self) -> bool {
        !self.discard_inhibition.is_search_off
    }

    /// Sets what is known about the memory files that a front end has just shared.
    pub fn set_pinning(&mut self, pinning: Pinning) {
        let is_blind = pinning.examined.is_empty();
        if is_blind && !std::mem::replace(&mut self.discard_inhibition.is_blindness_logged, true) {
            info!(
                "no other process that maps guest memory can be examined: use --inhibit-discard if a device is assigned to \
                 the guest (VFIO, iommufd, vDPA)"
            );
        }
        let pid = pinning.examined.last().copied().unwrap_or_default();
        let pinned_by = pinning.reason.map(|reason| PinnedBy { pid, reason });
        self.change_inhibition(|inhibition| inhibition.pinned_by = pinned_by);
    }

    /// As [`Device::set_pinning`], for memory files that were examined before. A process that pinned memory still does so
    /// if it could not be examined again: it may have become one of another user.
    pub(super) fn update_pinning(&mut self, pinning: Pinning) {
        let pinned_by = self.discard_inhibition.pinned_by.as_ref();
        let is_known = pinned_by.is_none_or(|it| pinning.examined.contains(&it.pid));
        if is_known || pinning.reason.is_some() {
            self.set_pinning(pinning);
        }
    }

    /// Applies what the last search for pinned memory has found, and starts another one from time to time.
    pub(super) fn poll_pinning(&mut self) {
        if !self.searches_for_pins() {
            return;
        }
        if let Some(pinning) = self.discard_inhibition.scan.poll(&self.ram) {
            self.update_pinning(pinning);
        }
    }

    fn change_inhibition(&mut self, change: impl FnOnce(&mut DiscardInhibition)) {
        let before = self.is_discard_inhibited();
        change(&mut self.discard_inhibition);
        let now = self.is_discard_inhibited();
        if before == now {
            return;
        }
        self.ram.inhibit_discard(now);
        // Which pages are in the balloon is not recorded meanwhile.
        self.partial_pages.clear();
        if now {
            warn!(
                "balloon releases no memory to the host: {}",
                self.discard_status().reasons.join("; ")
            );
        } else {
            info!("balloon releases memory to the host again");
        }
    }
}

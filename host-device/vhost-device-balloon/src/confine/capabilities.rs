// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Drops all capabilities.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    CapabilitySet, CapabilitySets,
};

/// Drops all capabilities of the calling thread. Also removes them from the bounding set, which limits what a program
/// could gain, unless the caller lacks the right to: then it has no capability that could be gained.
///
/// # Errors
///
/// If the host reports an error.
pub(super) fn drop_all() -> io::Result<()> {
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // The kernel has no such capability, and none after it.
            Err(Errno::INVAL) => break,
            Err(Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match clear_ambient_capability_set() {
        // A kernel without this set.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let none = CapabilitySet::empty();
    Ok(set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?)
}

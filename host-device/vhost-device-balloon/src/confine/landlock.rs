// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Landlock: an unprivileged program gives up its access to files, TCP ports and other processes.

use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset, RulesetAttr,
    Scope, ABI,
};

use super::failure::at;

/// The version whose rights are given up, as far as the kernel knows them.
const VERSION: ABI = ABI::V7;

/// What an older kernel lacks: the first version that has it, and its name.
const ADDITIONS: [(i32, &str); 4] = [
    (3, "truncation of files"),
    (4, "TCP ports"),
    (5, "control of devices"),
    (6, "signals and abstract sockets"),
];

/// Gives up all access that the kernel's Landlock covers: nothing is excepted. Returns what this kernel does not cover.
///
/// # Errors
///
/// If the kernel reports an error.
pub(super) fn restrict() -> Result<Option<String>, String> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(VERSION))
        .and_then(|it| it.handle_access(AccessNet::from_all(VERSION)))
        .and_then(|it| it.scope(Scope::from_all(VERSION)))
        .and_then(Ruleset::create)
        .map_err(at("rules"))?;
    let status = ruleset.restrict_self().map_err(at("restriction"))?;
    Ok(match status.landlock {
        LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        } => missing_in(kernel_abi.unwrap_or(effective_abi as i32)),
        LandlockStatus::NotEnabled => Some("not enabled it: see the boot option lsm=".into()),
        LandlockStatus::NotImplemented => Some("no Landlock: it came with Linux 5.13".into()),
    })
}

fn missing_in(version: i32) -> Option<String> {
    let missing: Vec<&str> = ADDITIONS
        .iter()
        .filter(|(since, _)| version < *since)
        .map(|(_, name)| *name)
        .collect();
    match missing.is_empty() {
        true => None,
        false => Some(format!(
            "version {version} of it, which does not cover {}",
            missing.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::missing_in;

    #[test]
    fn what_a_kernel_lacks_is_named() {
        assert_eq!(missing_in(6), None);
        let missing = missing_in(4).unwrap();
        assert_eq!(
            missing,
            "version 4 of it, which does not cover control of devices, signals and abstract sockets"
        );
        assert!(missing_in(1)
            .unwrap()
            .contains("truncation of files, TCP ports"));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The filter of system calls.
//!
//! There are two filters, and the kernel takes the stricter answer of both. The first answers some system calls with an
//! error. The second permits what the device needs, and forbids all else.

use std::collections::BTreeMap;
use std::process;

use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{
    apply_filter, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::failure::at;
use super::options::Seccomp;
use super::sys;
use super::system_calls::{CONDITIONAL, DENIED, PERMITTED, UNIMPLEMENTED};

/// Requests of `ioctl`, on all processors that the filters know. The C libraries have them in different types.
const FIONBIO: u64 = 0x5421;
const FIOCLEX: u64 = 0x5451;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Installs the filters for the calling thread, and the threads that it starts later.
///
/// # Errors
///
/// If the kernel refuses them, or does not run on a processor that the filters know.
pub(super) fn install(mode: Seccomp) -> Result<(), String> {
    let forbid = match mode {
        Seccomp::None => return Ok(()),
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Trap => SeccompAction::Trap,
        Seccomp::Kill => SeccompAction::KillProcess,
    };
    if mode == Seccomp::Trap {
        sys::name_forbidden_calls().map_err(at("signal"))?;
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(at("processor"))?;
    let compile = |rules, otherwise, action, arch: TargetArch| -> Result<BpfProgram, String> {
        let filter = SeccompFilter::new(rules, otherwise, action, arch).map_err(at("rules"))?;
        BpfProgram::try_from(filter).map_err(at("rules"))
    };
    let errno = |number: i32| SeccompAction::Errno(number.unsigned_abs());
    let errors = |table: &[(i64, &str)], number| {
        let rules = all_arguments(table);
        compile(rules, SeccompAction::Allow, errno(number), arch)
    };
    let mut programs = Vec::new();
    // With the log, the filter shows what would be forbidden, and changes nothing.
    if mode != Seccomp::Log {
        programs.push(errors(UNIMPLEMENTED, libc::ENOSYS)?);
        programs.push(errors(DENIED, libc::EACCES)?);
    }
    programs.push(compile(permitted()?, forbid, SeccompAction::Allow, arch)?);
    // The last filter forbids to install another one.
    programs
        .iter()
        .try_for_each(|program| apply_filter(program))
        .map_err(at("filter"))
}

fn all_arguments(table: &[(i64, &str)]) -> Rules {
    table.iter().map(|(call, _)| (*call, Vec::new())).collect()
}

/// The system calls that the second filter permits. Those of the first filter must be among them.
fn permitted() -> Result<Rules, String> {
    let mut rules = Rules::new();
    for table in [PERMITTED, UNIMPLEMENTED, DENIED] {
        rules.extend(all_arguments(table));
    }
    for (call, _) in CONDITIONAL {
        rules.insert(*call, conditions(*call)?);
    }
    Ok(rules)
}

/// Returns the rules of which one must hold for the arguments of a system call.
fn conditions(call: i64) -> Result<Vec<SeccompRule>, String> {
    let bits = |bits: i32| u64::from(bits.unsigned_abs());
    // One of several values of an argument.
    let one_of = |argument, length: fn() -> SeccompCmpArgLen, values: &[u64]| {
        let rules = values
            .iter()
            .map(|value| rule(&[(argument, length(), Eq, *value)]));
        rules.collect::<Result<Vec<_>, _>>()
    };
    match call {
        // Threads only.
        libc::SYS_clone => {
            let thread = bits(libc::CLONE_THREAD);
            Ok(vec![rule(&[(0, Qword, MaskedEq(thread), thread)])?])
        }
        // No signals to other processes when a file changes (F_SETOWN, F_NOTIFY).
        libc::SYS_fcntl => one_of(
            1,
            || Dword,
            &[
                libc::F_DUPFD_CLOEXEC,
                libc::F_GETFD,
                libc::F_SETFD,
                libc::F_GETFL,
                libc::F_SETFL,
                libc::F_GET_SEALS,
            ]
            .map(bits),
        ),
        libc::SYS_ioctl => one_of(1, || Dword, &[FIONBIO, FIOCLEX]),
        // No memory that can be executed.
        libc::SYS_mmap | libc::SYS_mprotect => {
            let execute = bits(libc::PROT_EXEC);
            Ok(vec![rule(&[(2, Dword, MaskedEq(execute), 0)])?])
        }
        libc::SYS_prctl => one_of(0, || Dword, &[bits(libc::PR_SET_NAME)]),
        // Limits of this process can be read.
        libc::SYS_prlimit64 => Ok(vec![rule(&[(0, Dword, Eq, 0), (2, Qword, Eq, 0)])?]),
        // The handler of SIGSYS stays.
        libc::SYS_rt_sigaction => Ok(vec![rule(&[(0, Dword, Ne, bits(libc::SIGSYS))])?]),
        // No sockets that could send to an address.
        libc::SYS_socketpair => {
            let kinds = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET].map(bits);
            let rules = kinds.into_iter().map(|kind| {
                rule(&[
                    (0, Dword, Eq, bits(libc::AF_UNIX)),
                    (1, Dword, MaskedEq(0xf), kind),
                ])
            });
            rules.collect()
        }
        // To this process, for example to abort it.
        libc::SYS_tgkill => Ok(vec![rule(&[(0, Dword, Eq, process::id().into())])?]),
        _ => Err(format!("system call {call} has no conditions")),
    }
}

/// Returns a rule that holds if all of its conditions do: argument, length, comparison, value.
fn rule(conditions: &[(u8, SeccompCmpArgLen, SeccompCmpOp, u64)]) -> Result<SeccompRule, String> {
    let conditions = conditions
        .iter()
        .map(|(argument, length, comparison, value)| {
            SeccompCondition::new(*argument, length.clone(), comparison.clone(), *value)
        });
    conditions
        .collect::<Result<Vec<_>, _>>()
        .and_then(SeccompRule::new)
        .map_err(at("rules"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_conditional_system_call_has_conditions() {
        let rules = permitted().unwrap();
        for (call, name) in CONDITIONAL {
            assert!(rules.get(call).is_some_and(|it| !it.is_empty()), "{name}");
        }
        assert!(conditions(-1).is_err());
    }
}

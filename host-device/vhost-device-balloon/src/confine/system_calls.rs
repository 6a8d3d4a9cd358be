// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The system calls of the device, by what the filter does with them.

/// Declares tables of system calls with their names, and a function that looks a name up.
macro_rules! system_calls {
    ($($(#[$attribute:meta])* $table:ident: [$($(#[$condition:meta])? $call:ident,)*])*) => {
        $(
            $(#[$attribute])*
            pub(super) const $table: &[(libc::c_long, &str)] =
                &[$($(#[$condition])? (libc::$call, stringify!($call)),)*];
        )*

        /// Returns the name of a system call, or `with an unknown name`.
        pub(super) fn name(number: libc::c_long) -> &'static str {
            let tables = [$($table),*];
            let mut calls = tables.iter().flat_map(|table| table.iter());
            let name = calls.find(|(call, _)| *call == number).map(|(_, name)| *name);
            // `SYS_openat`
            name.and_then(|name| name.get(4..)).unwrap_or("with an unknown name")
        }
    };
}

system_calls! {
    /// Permitted with all arguments.
    PERMITTED: [
        // Memory.
        SYS_brk, SYS_madvise, SYS_mremap, SYS_munmap,
        // Threads, time, and the end.
        SYS_clock_getres, SYS_clock_gettime, SYS_clock_nanosleep, SYS_exit, SYS_exit_group, SYS_futex, SYS_getpid,
        SYS_getrandom, SYS_gettid, SYS_gettimeofday, SYS_membarrier, SYS_nanosleep, SYS_restart_syscall, SYS_rseq,
        SYS_sched_getaffinity, SYS_sched_yield, SYS_set_robust_list, SYS_sysinfo,
        #[cfg(target_arch = "x86_64")] SYS_time,
        // Signals of this process.
        SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack,
        // Open files: guest memory, events, connections, the log.
        SYS_close, SYS_dup, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_eventfd2, SYS_fallocate, SYS_fstat,
        SYS_fstatfs, SYS_lseek, SYS_newfstatat, SYS_pipe2, SYS_ppoll, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_pwrite64,
        SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readv, SYS_statx, SYS_write, SYS_writev,
        #[cfg(target_arch = "x86_64")] SYS_epoll_wait,
        #[cfg(target_arch = "x86_64")] SYS_poll,
        SYS_accept4, SYS_getpeername, SYS_getsockname, SYS_getsockopt, SYS_recvfrom, SYS_recvmsg, SYS_sendmsg, SYS_sendto,
        SYS_setsockopt, SYS_shutdown,
    ]
    /// Permitted with some arguments: see `seccomp`.
    CONDITIONAL: [
        SYS_clone, SYS_fcntl, SYS_ioctl, SYS_mmap, SYS_mprotect, SYS_prctl, SYS_prlimit64, SYS_rt_sigaction, SYS_socketpair,
        SYS_tgkill,
    ]
    /// Answered with ENOSYS: the C library then uses `clone`, whose arguments can be examined.
    UNIMPLEMENTED: [
        SYS_clone3,
    ]
    /// Answered with EACCES. Libraries look for files that they do not need, for example for the backtrace of a panic.
    DENIED: [
        SYS_faccessat, SYS_faccessat2, SYS_getcwd, SYS_openat, SYS_openat2, SYS_readlinkat,
        #[cfg(target_arch = "x86_64")] SYS_access,
        #[cfg(target_arch = "x86_64")] SYS_lstat,
        #[cfg(target_arch = "x86_64")] SYS_open,
        #[cfg(target_arch = "x86_64")] SYS_readlink,
        #[cfg(target_arch = "x86_64")] SYS_stat,
    ]
    /// Forbidden, as is each system call that no table has. These are only known by name.
    FORBIDDEN: [
        SYS_bind, SYS_bpf, SYS_capset, SYS_chdir, SYS_chroot, SYS_connect, SYS_execve, SYS_execveat, SYS_fchmod,
        SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_ftruncate, SYS_init_module, SYS_io_uring_enter, SYS_io_uring_setup,
        SYS_kill, SYS_linkat, SYS_listen, SYS_memfd_create, SYS_mkdirat, SYS_mknodat, SYS_mount, SYS_pidfd_getfd,
        SYS_pidfd_open, SYS_pidfd_send_signal, SYS_pivot_root, SYS_process_vm_readv, SYS_process_vm_writev, SYS_ptrace,
        SYS_renameat2, SYS_rt_sigqueueinfo, SYS_seccomp, SYS_setgid, SYS_setns, SYS_setresgid, SYS_setresuid, SYS_setsid,
        SYS_setuid, SYS_socket, SYS_symlinkat, SYS_tkill, SYS_truncate, SYS_umount2, SYS_unlinkat, SYS_unshare,
        SYS_userfaultfd, SYS_wait4, SYS_waitid,
        #[cfg(target_arch = "x86_64")] SYS_fork,
        #[cfg(target_arch = "x86_64")] SYS_mkdir,
        #[cfg(target_arch = "x86_64")] SYS_rename,
        #[cfg(target_arch = "x86_64")] SYS_unlink,
        #[cfg(target_arch = "x86_64")] SYS_vfork,
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_system_call_is_in_one_table_and_has_a_name() {
        let tables = [PERMITTED, CONDITIONAL, UNIMPLEMENTED, DENIED, FORBIDDEN];
        let mut seen = BTreeSet::new();
        for (number, text) in tables.iter().flat_map(|table| table.iter()) {
            assert!(seen.insert(*number), "{text}");
            assert_eq!(format!("SYS_{}", name(*number)), *text);
        }
        assert_eq!(name(-1), "with an unknown name");
    }
}

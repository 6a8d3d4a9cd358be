// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of confinement: a confined process tries what is forbidden.
//!
//! Each attempt runs in a process of its own with one thread, which confines itself as the daemon does. Without confinement
//! each attempt succeeds, which a test checks first.

use std::env;
use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::OnceLock;

use clap::ValueEnum;
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::fs::Mode;
use rustix::mount::{mount, MountFlags};
use rustix::process::{geteuid, getppid, kill_process, pidfd_open, Pid, PidfdFlags, Signal};
use vhost_device_balloon::confine::{Confinement, Sandbox, Seccomp, Switch};

/// The first argument of a process that makes an attempt. Measures, attempt and directory follow.
const ATTEMPT: &str = "attempt";

const SIGSYS: i32 = 31;
const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EACCES: i32 = 13;

type Test = (&'static str, fn() -> Result<(), Failed>);

type Attempt = fn(&Path, u16) -> io::Result<()>;

/// What a device process that was taken over might try, in a directory of its own and with the port of a TCP server.
const ATTEMPTS: [(&str, Attempt); 15] = [
    ("read a file", |_, _| File::open("/etc/passwd").map(drop)),
    ("read the sockets' directory", |directory, _| {
        fs::read_dir(directory).map(drop)
    }),
    ("write a file", |directory, _| {
        fs::write(directory.join("new"), "x")
    }),
    ("remove a file", |directory, _| {
        fs::remove_file(directory.join("old"))
    }),
    ("read memory maps of another process", |_, _| {
        fs::read(format!("/proc/{}/maps", parent().as_raw_pid())).map(drop)
    }),
    ("execute a program", |_, _| {
        Command::new("/bin/true").status().map(drop)
    }),
    ("connect over TCP", |_, port| {
        TcpStream::connect(("127.0.0.1", port)).map(drop)
    }),
    ("connect to a Unix socket", |directory, _| {
        std::os::unix::net::UnixStream::connect(directory.join("socket")).map(drop)
    }),
    ("listen on a Unix socket", |directory, _| {
        std::os::unix::net::UnixListener::bind(directory.join("listener")).map(drop)
    }),
    ("send a signal", |_, _| {
        Ok(kill_process(parent(), Signal::CONT)?)
    }),
    ("open another process", |_, _| {
        Ok(pidfd_open(parent(), PidfdFlags::empty()).map(drop)?)
    }),
    ("trace another process", |_, _| {
        let pid = nix::unistd::Pid::from_raw(parent().as_raw_pid());
        // The parent waits for this process, and exits of both follow.
        nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty())?;
        Ok(nix::sys::ptrace::detach(pid, None).or(Ok::<(), nix::Error>(()))?)
    }),
    ("mount a file system", |directory, _| {
        let flags = MountFlags::NOSUID;
        Ok(mount(
            "tmpfs",
            directory.join("mount"),
            "tmpfs",
            flags,
            None,
        )?)
    }),
    ("make a device", |directory, _| {
        let (kind, mode) = (rustix::fs::FileType::CharacterDevice, Mode::RUSR);
        let null = rustix::fs::makedev(1, 3);
        Ok(rustix::fs::mknodat(
            rustix::fs::CWD,
            directory.join("null"),
            kind,
            mode,
            null,
        )?)
    }),
    ("enter a namespace", |_, _| {
        let namespace = File::open("/proc/self/ns/net")?;
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        Ok(rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            kind,
        )?)
    }),
];

/// Attempts that succeed only with the rights of root.
const OF_ROOT: [&str; 3] = ["mount a file system", "make a device", "enter a namespace"];

/// The parent of this process, which it cannot ask for when it is confined.
static PARENT: OnceLock<Pid> = OnceLock::new();

fn parent() -> Pid {
    *PARENT.get_or_init(|| getppid().unwrap())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    if arguments.get(1).is_some_and(|it| it == ATTEMPT) {
        return attempt(&arguments[2..]);
    }
    let tests: [Test; 8] = [
        ("without_confinement_each_attempt_succeeds", || {
            for (name, _) in ATTEMPTS {
                if !OF_ROOT.contains(&name) || is_root() {
                    expect(NONE, name, |it| it.is_done())?;
                }
            }
            Ok(())
        }),
        ("with_all_measures_each_attempt_fails", || {
            for (name, _) in ATTEMPTS {
                expect("default", name, |it| !it.is_done())?;
            }
            Ok(())
        }),
        ("seccomp_kills_and_names_the_system_call", || {
            for (name, call) in [
                ("connect over TCP", "socket"),
                ("connect to a Unix socket", "socket"),
                ("listen on a Unix socket", "socket"),
                ("send a signal", "kill"),
                ("open another process", "pidfd_open"),
                ("trace another process", "ptrace"),
                ("mount a file system", "mount"),
                ("make a device", "mknodat"),
            ] {
                let line = format!("seccomp: system call {call} (");
                expect("seccomp=trap", name, |it| {
                    it.signal == Some(SIGSYS) && it.log.contains(&line)
                })?;
                expect("seccomp=kill", name, |it| {
                    it.signal == Some(SIGSYS) && it.log.is_empty()
                })?;
            }
            // The C library blocks the signal of the handler while it starts a program.
            for measures in ["seccomp=trap", "seccomp=kill"] {
                expect(measures, "execute a program", |it| {
                    it.signal == Some(SIGSYS)
                })?;
            }
            // Libraries look for files, so this is an error only.
            expect("seccomp=trap", "read a file", |it| it.is_error(EACCES))?;
            expect("seccomp=kill", "write a file", |it| it.is_error(EACCES))?;
            // This changes nothing.
            expect("seccomp=log", "execute a program", Outcome::is_done)
        }),
        ("landlock_denies_files_ports_and_signals", || {
            if !has_landlock() {
                println!("this kernel has no Landlock");
                return Ok(());
            }
            for name in [
                "read a file",
                "read the sockets' directory",
                "write a file",
                "remove a file",
                "execute a program",
                "listen on a Unix socket",
            ] {
                expect("landlock=on", name, |it| it.is_error(EACCES))?;
            }
            for name in ["trace another process", "mount a file system"] {
                expect("landlock=on", name, |it| it.is_error(EPERM))?;
            }
            expect("landlock=on", "make a device", |it| {
                it.is_error(EACCES) || it.is_error(EPERM)
            })?;
            // Kernels before 6.7 and 6.12 do not deny these.
            expect("landlock=on", "connect over TCP", |it| {
                it.is_error(EACCES) || lacks(it, "TCP ports")
            })?;
            expect("landlock=on", "send a signal", |it| {
                it.is_error(EPERM) || lacks(it, "signals")
            })
        }),
        ("dropped_capabilities_are_gone", || {
            for name in OF_ROOT {
                expect("drop-capabilities=on", name, |it| it.is_error(EPERM))?;
            }
            // What needs none still works.
            expect("drop-capabilities=on", "read a file", Outcome::is_done)
        }),
        ("no_new_privileges_are_granted", || {
            expect("no-new-privs=on", "read a file", |it| {
                it.is_done() && it.status.contains("NoNewPrivs:\t1\n")
            })?;
            expect(NONE, "read a file", |it| {
                it.status.contains("NoNewPrivs:\t0\n")
            })
        }),
        ("a_namespace_is_empty_and_without_network", || {
            if !is_permitted("sandbox=namespace") {
                println!("this host forbids user namespaces");
                return Ok(());
            }
            is_empty("sandbox=namespace")?;
            expect("sandbox=namespace", "connect over TCP", |it| {
                it.error.is_some()
            })?;
            // All that the host forbids a user is forbidden to root as well.
            expect("sandbox=namespace", "make a device", |it| {
                it.error.is_some()
            })
        }),
        ("a_chroot_is_empty", || {
            if !is_root() {
                expect("sandbox=chroot", "read a file", |it| {
                    it.log.contains("sandbox cannot be set up: chroot")
                })?;
                return Ok(());
            }
            is_empty("sandbox=chroot")
        }),
    ];
    let trials = tests.map(|(name, test)| Trial::test(name, test));
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit_code()
}

const NONE: &str = "none";

fn is_root() -> bool {
    geteuid().is_root()
}

fn has_landlock() -> bool {
    let output = run("landlock=on", "read a file").unwrap();
    !output.log.contains("no Landlock") && !output.log.contains("not enabled it")
}

fn lacks(outcome: &Outcome, what: &str) -> bool {
    outcome.log.contains("does not cover") && outcome.log.contains(what)
}

fn is_permitted(measures: &str) -> bool {
    !run(measures, "read a file")
        .unwrap()
        .log
        .contains("sandbox cannot be set up")
}

/// Checks that a sandbox has no files.
fn is_empty(measures: &str) -> Result<(), Failed> {
    for name in [
        "read a file",
        "read the sockets' directory",
        "write a file",
        "remove a file",
        "read memory maps of another process",
        "execute a program",
        "connect to a Unix socket",
        "listen on a Unix socket",
        "mount a file system",
        "enter a namespace",
    ] {
        expect(measures, name, |it| it.is_error(ENOENT))?;
    }
    Ok(())
}

/// How an attempt has ended.
#[derive(Debug)]
struct Outcome {
    /// The error of the attempt, or `None` if it has succeeded or its process was killed.
    error: Option<i32>,
    signal: Option<i32>,
    has_ended: bool,
    /// The file `/proc/self/status` after the confinement, if it can be read.
    status: String,
    log: String,
}

impl Outcome {
    fn is_done(&self) -> bool {
        self.has_ended && self.error.is_none()
    }

    fn is_error(&self, number: i32) -> bool {
        self.error == Some(number)
    }
}

fn expect(
    measures: &str,
    attempt: &str,
    is_expected: impl FnOnce(&Outcome) -> bool,
) -> Result<(), Failed> {
    let outcome = run(measures, attempt).map_err(|error| Failed::from(error.to_string()))?;
    match is_expected(&outcome) {
        true => Ok(()),
        false => Err(format!("{measures}: {attempt}: {outcome:?}").into()),
    }
}

/// Makes an attempt in a process of its own.
fn run(measures: &str, attempt: &str) -> io::Result<Outcome> {
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("old"), "x")?;
    fs::create_dir(directory.path().join("mount"))?;
    let _socket = std::os::unix::net::UnixListener::bind(directory.path().join("socket"))?;
    let server = std::net::TcpListener::bind("127.0.0.1:0")?;
    // A process between this one and the attempt, which can be stopped and traced.
    let output = Command::new("sh")
        .arg("-c")
        .arg("\"$@\"; exit $?")
        .arg("sh")
        .arg(env::current_exe()?)
        .args([ATTEMPT, measures, attempt])
        .arg(directory.path())
        .arg(server.local_addr()?.port().to_string())
        .stdin(Stdio::null())
        .output()?;
    let _ = rustix::mount::unmount(
        directory.path().join("mount"),
        rustix::mount::UnmountFlags::DETACH,
    );
    Ok(outcome(&output))
}

fn outcome(output: &Output) -> Outcome {
    let text = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let (status, end) = text.split_once("END ").unwrap_or((&text, ""));
    // A shell reports the signal of its child so.
    let signal = output.status.code().and_then(|code| code.checked_sub(128));
    Outcome {
        error: end.trim().parse().ok().filter(|number| *number != 0),
        signal: signal.filter(|it| *it > 0).or(output.status.signal()),
        has_ended: !end.is_empty(),
        status: status.to_owned(),
        log: log
            .lines()
            // The message of the shell about its child.
            .filter(|line| !line.contains("Bad system call"))
            .map(|line| format!("{line}\n"))
            .collect(),
    }
}

/// Parses measures such as `seccomp=trap`, confines this process, and makes an attempt.
fn attempt(arguments: &[String]) -> ExitCode {
    let [measures, attempt, directory, port] = arguments else {
        return ExitCode::FAILURE;
    };
    let mut confinement = match measures.as_str() {
        "default" => Confinement::default(),
        _ => Confinement::NONE,
    };
    if let Some((measure, value)) = measures.split_once('=') {
        let switch = || Switch::from_str(value, false).unwrap();
        match measure {
            "sandbox" => confinement.sandbox = Some(Sandbox::from_str(value, false).unwrap()),
            "seccomp" => confinement.seccomp = Seccomp::from_str(value, false).unwrap(),
            "landlock" => confinement.landlock = switch(),
            "drop-capabilities" => confinement.drop_capabilities = switch(),
            "no-new-privs" => confinement.no_new_privs = switch(),
            _ => return ExitCode::FAILURE,
        }
    }
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    parent();
    if let Err(error) = confinement.apply() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = ATTEMPTS.iter().find(|(name, _)| name == attempt);
    let result = found.unwrap().1(Path::new(directory), port.parse().unwrap());
    let number = match result {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    };
    print!("{status}END {number}");
    ExitCode::SUCCESS
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The connection to the host: a virtio-serial port, or a serial line in raw mode.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use guest_agent::protocol::{PORT_NAME, PORT_VARIABLE};
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg};

/// The timeout for the port to appear, from the start of the agent.
const PORT_TIMEOUT: Duration = Duration::from_secs(600);

/// Waits until the kernel has found the port, and opens it.
pub fn open() -> Result<File> {
    if let Some(line) = std::env::var_os(PORT_VARIABLE) {
        return open_serial(Path::new(&line));
    }
    let path = wait_virtio_port()?;
    open_file(&path)
}

fn open_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Opens a serial line in raw mode: without echo, line editing or translation.
fn open_serial(path: &Path) -> Result<File> {
    let line = open_file(path)?;
    let mut settings =
        tcgetattr(&line).with_context(|| format!("{} is no serial line", path.display()))?;
    cfmakeraw(&mut settings);
    tcsetattr(&line, SetArg::TCSANOW, &settings).context("cannot make the serial line raw")?;
    Ok(line)
}

fn wait_virtio_port() -> Result<PathBuf> {
    let deadline = Instant::now() + PORT_TIMEOUT;
    loop {
        if let Some(path) = scan_virtio_ports()? {
            return Ok(path);
        }
        if Instant::now() > deadline {
            bail!("no virtio-serial port named {PORT_NAME}, and {PORT_VARIABLE} is not set");
        }
        sleep(Duration::from_millis(5));
    }
}

fn scan_virtio_ports() -> io::Result<Option<PathBuf>> {
    let ports = match fs::read_dir("/sys/class/virtio-ports") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        ports => ports?,
    };
    for port in ports {
        let port = port?;
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Ok(Some(Path::new("/dev").join(port.file_name())));
        }
    }
    Ok(None)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hardware of a QEMU machine.
//!
//! The default is a q35 without QEMU's default devices, with one processor, and with memory in one shared memfd.

use std::path::{Path, PathBuf};

/// Hardware that may differ from the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    /// QEMU's name of another machine type.
    pub machine: Option<&'static str>,
    /// Whether the machine has QEMU's default devices: a display, a network card, a disk drive.
    pub default_devices: bool,
    /// The number of processors; 0 means one.
    pub processors: u32,
    /// The backend of the memory.
    pub memory: MemoryBackend,
    /// The number of NUMA nodes, each with one processor, an equal part of the memory and its own memory backend; 0 if
    /// the machine is not NUMA.
    pub numa_nodes: u32,
    /// The maximum size of hot-plugged memory, in bytes.
    pub hotplug_memory: u64,
    /// Whether QEMU locks all its memory.
    pub mem_lock: bool,
    /// Whether the machine reboots on a reset. Otherwise QEMU ends.
    pub allow_reboot: bool,
    /// Further arguments of QEMU.
    pub arguments: Vec<String>,
}

/// The backend of guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MemoryBackend {
    /// A memfd.
    #[default]
    Memfd,
    /// A memfd whose memory is allocated at the start.
    Preallocated,
    /// A memfd that QEMU maps privately.
    Private,
    /// A memfd with huge pages of 2 MiB.
    HugePages,
    /// A file.
    File(PathBuf),
}

impl Hardware {
    /// Returns the number of processors: at least one for each NUMA node.
    pub(crate) fn processors(&self) -> u32 {
        self.processors.max(self.numa_nodes).max(1)
    }

    /// The number of slots for hot-plugged memory.
    pub(crate) const MEMORY_SLOTS: u32 = 4;

    /// Returns the arguments for `bytes` bytes of memory, in `file` if it is set, and for processors and NUMA nodes.
    pub(crate) fn memory_arguments(&self, bytes: u64, file: Option<&Path>) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        let numa_nodes = u64::from(self.numa_nodes.max(1));
        for node in 0..numa_nodes {
            let (id, size) = if self.numa_nodes == 0 {
                ("mem".to_owned(), bytes)
            } else {
                (format!("mem{node}"), bytes / numa_nodes)
            };
            add("-object", self.backend(&id, size, file));
            if self.numa_nodes > 0 {
                add(
                    "-numa",
                    format!("node,nodeid={node},cpus={node},memdev={id}"),
                );
            }
        }
        let mut memory = format!("{}M", bytes / crate::MIB);
        if self.hotplug_memory > 0 {
            let most = (bytes + self.hotplug_memory) / crate::MIB;
            memory.push_str(&format!(",slots={},maxmem={most}M", Self::MEMORY_SLOTS));
        }
        add("-m", memory);
        if self.mem_lock {
            add("-overcommit", "mem-lock=on".to_owned());
        }
        add("-smp", self.processors().to_string());
        arguments
    }

    fn backend(&self, id: &str, size: u64, file: Option<&Path>) -> String {
        let in_file =
            |file: &Path| format!("memory-backend-file,mem-path={},share=on", file.display());
        let kind = match (file, &self.memory) {
            (Some(file), _) => in_file(file),
            (None, MemoryBackend::File(file)) => in_file(file),
            (None, MemoryBackend::Memfd) => "memory-backend-memfd,share=on".to_owned(),
            (None, MemoryBackend::Preallocated) => {
                "memory-backend-memfd,share=on,prealloc=on".to_owned()
            }
            (None, MemoryBackend::Private) => "memory-backend-memfd,share=off".to_owned(),
            (None, MemoryBackend::HugePages) => {
                "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M".to_owned()
            }
        };
        format!("{kind},id={id},size={size}")
    }

    /// Returns the value of QEMU's `-machine` option.
    pub(crate) fn machine_argument(&self) -> String {
        let kind = self.machine.unwrap_or("q35");
        if self.numa_nodes == 0 {
            format!("{kind},memory-backend=mem")
        } else {
            kind.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_node_has_its_part_of_the_memory() {
        let hardware = Hardware {
            numa_nodes: 2,
            hotplug_memory: 1 << 30,
            ..Hardware::default()
        };
        let text = hardware.memory_arguments(1 << 29, None).join(" ");
        assert_eq!(
            text,
            "-object memory-backend-memfd,share=on,id=mem0,size=268435456 -numa node,nodeid=0,cpus=0,memdev=mem0 \
             -object memory-backend-memfd,share=on,id=mem1,size=268435456 -numa node,nodeid=1,cpus=1,memdev=mem1 \
             -m 512M,slots=4,maxmem=1536M -smp 2"
        );
    }
}

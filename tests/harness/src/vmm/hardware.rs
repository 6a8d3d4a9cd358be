// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! In what a machine of QEMU's may differ from the usual one: a q35 without devices that nobody asked for, with one
//! processor, and memory in one shared memfd.

use std::path::{Path, PathBuf};

/// In what a machine differs from the usual one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hardware {
    /// QEMU's name of another kind of machine.
    pub machine: Option<&'static str>,
    /// Whether it has what QEMU gives a machine unasked: a display, a network card, a disk drive.
    pub default_devices: bool,
    /// Processors; 0 stands for one.
    pub processors: u32,
    /// What its memory lies in.
    pub memory: MemoryBackend,
    /// NUMA nodes, each with a processor, an even part of the memory and a memory backend of its own; 0 if it is no NUMA
    /// machine.
    pub numa_nodes: u32,
    /// Bytes of memory that can be plugged in while it runs.
    pub hotplug_memory: u64,
    /// Whether QEMU locks all of its memory.
    pub mem_lock: bool,
    /// Whether it starts anew at a reset, and does not end.
    pub allow_reboot: bool,
    /// More arguments of QEMU's.
    pub arguments: Vec<String>,
}

/// What memory lies in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MemoryBackend {
    /// A memfd.
    #[default]
    Memfd,
    /// A memfd whose memory the host has given at the start.
    Preallocated,
    /// A memfd that is QEMU's alone.
    Private,
    /// A memfd of huge pages of 2 MiB.
    HugePages,
    /// A file.
    File(PathBuf),
}

impl Hardware {
    /// Processors: one at least for each node.
    pub(crate) fn processors(&self) -> u32 {
        self.processors.max(self.numa_nodes).max(1)
    }

    /// Slots for memory that is plugged in.
    pub(crate) const MEMORY_SLOTS: u32 = 4;

    /// Adds what the machine has `bytes` of memory by, in `file` if there is one.
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

    /// The value of QEMU's `-machine`.
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unpacks compressed kernel images. QEMU starts the program inside directly, which saves each emulated guest a third
//! of its boot time.
//!
//! The format: `Documentation/arch/x86/boot.rst`, fields `setup_sects`, `header`, `payload_offset` and
//! `payload_length`.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use zstd::stream::Decoder;

/// The limit for the size of an unpacked kernel. No kernel reaches it.
const LARGEST: u64 = 1 << 30;

/// Unpacks the kernel `image` into `folder`, unless there is a copy that is not older, and returns the path of the
/// copy. Returns `None` if the image is not compressed with zstd.
pub fn ensure(image: &Path, folder: &Path) -> Result<Option<PathBuf>> {
    let target = folder.join("vmlinux");
    let changed = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let packed = changed(image).with_context(|| format!("cannot read {}", image.display()))?;
    if changed(&target).is_ok_and(|unpacked| unpacked >= packed) {
        return Ok(Some(target));
    }
    let image = fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let Some(program) = program(&image)? else {
        return Ok(None);
    };
    // A concurrent run may do the same. The rename gives both a complete file.
    let draft = folder.join(format!("vmlinux.{}", std::process::id()));
    fs::write(&draft, program).with_context(|| format!("cannot write {}", draft.display()))?;
    fs::rename(&draft, &target).with_context(|| format!("cannot write {}", target.display()))?;
    Ok(Some(target))
}

/// Returns the program in a kernel image; `None` if it is not compressed with zstd.
fn program(image: &[u8]) -> Result<Option<Vec<u8>>> {
    const SECTOR: usize = 512;
    const ZSTD: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    ensure!(
        image.get(0x202..0x206) == Some(b"HdrS"),
        "the kernel is no image for x86"
    );
    let sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let (offset, length) = word(0x248).zip(word(0x24c)).context("a cut kernel image")?;
    let start = (sectors + 1) * SECTOR + offset;
    let payload = image
        .get(start..start.saturating_add(length))
        .context("a cut kernel image")?;
    if !payload.starts_with(&ZSTD) {
        return Ok(None);
    }
    // The length of the program follows the compressed data, so only one frame is decoded.
    let unpacking = Decoder::new(payload).context("cannot unpack the kernel")?;
    let mut program = Vec::new();
    unpacking
        .single_frame()
        .take(LARGEST)
        .read_to_end(&mut program)
        .context("cannot unpack the kernel")?;
    ensure!(
        program.starts_with(b"\x7fELF"),
        "there is no program in the kernel image"
    );
    Ok(Some(program))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn the_program_in_a_kernel_is_found() {
        let elf = b"\x7fELF and so on";
        let mut payload = zstd::encode_all(&elf[..], 1).unwrap();
        payload.extend([14, 0, 0, 0]);
        assert_eq!(program(&image(&payload)).unwrap().unwrap(), elf);
    }

    #[test]
    fn a_kernel_that_is_packed_otherwise_stays_as_it_is() {
        assert!(program(&image(b"\xfd7zXZ")).unwrap().is_none());
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(program(&[]).is_err());
        assert!(program(&[0; 4096]).is_err());
        let mut cut = image(&zstd::encode_all(&b"\x7fELF"[..], 1).unwrap());
        cut.truncate(1050);
        assert!(program(&cut).is_err());
        assert!(program(&image(&zstd::encode_all(&b"text"[..], 1).unwrap())).is_err());
    }
}

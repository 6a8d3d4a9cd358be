// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sizes in the format of the user.

/// Suffixes and their factors.
const UNITS: [(&str, u64); 5] = [
    ("T", 1 << 40),
    ("G", 1 << 30),
    ("M", 1 << 20),
    ("K", 1 << 10),
    ("", 1),
];

/// The smallest number of bytes that needs no suffix. A smaller number may be meant in MiB, as in QEMU's `balloon 300`.
const BARE_MIN: u64 = 1 << 20;

/// Returns the bytes of a size such as `2G`, `1.5G`, `512MiB`, `300B` or `1073741824`. Suffixes are powers of 1024. A
/// number without a suffix is a number of bytes: at least 1 MiB, or 0.
///
/// # Errors
///
/// A sentence that states the expected format.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size; examples: 2G, 1.5G, 512M, 1073741824");
    let upper = text.trim().to_ascii_uppercase();
    let number = upper.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let suffix = upper.get(number.len()..).unwrap_or_default();
    let is_bare = suffix.is_empty();
    let suffix = suffix.strip_suffix('B').unwrap_or(suffix);
    let suffix = suffix.strip_suffix('I').unwrap_or(suffix);
    let unit = UNITS.iter().find(|(name, _)| *name == suffix);
    let (_, unit) = unit.ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return Err(wrong());
    }
    if *unit == 1 && !fraction.is_empty() {
        return Err(format!(
            "'{text}' has no unit: write {number}G or {number}M"
        ));
    }
    let too_large = || format!("'{text}' exceeds 2^64 bytes");
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let whole = whole.checked_mul(*unit).ok_or_else(too_large)?;
    let part = fraction
        .bytes()
        .try_fold((0u128, 1u128), |(sum, scale), digit| {
            let sum = sum.checked_mul(10)?.checked_add(u128::from(digit & 15))?;
            Some((sum, scale.checked_mul(10)?))
        });
    let (sum, scale) = part.ok_or_else(wrong)?;
    let part = sum
        .checked_mul(u128::from(*unit))
        .and_then(|bytes| bytes.checked_div(scale));
    let part = part
        .and_then(|bytes| u64::try_from(bytes).ok())
        .ok_or_else(wrong)?;
    let bytes = whole.checked_add(part).ok_or_else(too_large)?;
    if is_bare && (1..BARE_MIN).contains(&bytes) {
        return Err(format!(
            "'{text}' has no unit: write {text}M for MiB, or {text}B for bytes"
        ));
    }
    Ok(bytes)
}

/// Returns a size with about three digits and a suffix: `1.50 GiB`.
#[must_use]
pub fn show(bytes: u64) -> String {
    for (name, unit) in UNITS {
        if bytes >= unit && !name.is_empty() {
            // Precise enough for a value that is shown.
            #[allow(clippy::cast_precision_loss)]
            let number = bytes as f64 / unit as f64;
            let digits = if number < 10.0 {
                2
            } else {
                usize::from(number < 100.0)
            };
            return format!("{number:.digits$} {name}iB");
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("4096B", 4096),
            ("1048576", 1 << 20),
            ("1073741824", 1 << 30),
            ("2G", 2 << 30),
            ("2g", 2 << 30),
            ("1.5G", 3 << 29),
            ("512MiB", 512 << 20),
            ("512MB", 512 << 20),
            (" 3k ", 3072),
            ("0", 0),
            ("0.25K", 256),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "1..2",
            "2X",
            "2GG",
            "1e3",
            ".5G",
            "99999999T",
            "1.0000000001G",
            "1.5",
            "1.5B",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    /// QEMU's human monitor takes MiB, and QMP takes bytes.
    #[test]
    fn a_small_number_without_a_unit_is_refused_and_the_choice_is_named() {
        for text in ["1", "300", "4096", "1048575"] {
            let error = parse(text).unwrap_err();
            let expected =
                format!("'{text}' has no unit: write {text}M for MiB, or {text}B for bytes");
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (20 << 20, "20.0 MiB"),
            (411 << 20, "411 MiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(show(bytes), text);
        }
    }
}

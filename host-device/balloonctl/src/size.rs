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

/// Returns the bytes of a size such as `2G`, `1.5G`, `512MiB` or `4096`. Suffixes are powers of 1024.
///
/// # Errors
///
/// A sentence that states the expected format.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size; examples: 2G, 1.5G, 512M, 4096");
    let upper = text.trim().to_ascii_uppercase();
    let number = upper.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let suffix = upper.get(number.len()..).unwrap_or_default();
    let suffix = suffix.strip_suffix('B').unwrap_or(suffix);
    let suffix = suffix.strip_suffix('I').unwrap_or(suffix);
    let unit = UNITS.iter().find(|(name, _)| *name == suffix);
    let (_, unit) = unit.ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return Err(wrong());
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
    whole.checked_add(part).ok_or_else(too_large)
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
            ("4096", 4096),
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
        ] {
            assert!(parse(text).is_err(), "{text}");
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

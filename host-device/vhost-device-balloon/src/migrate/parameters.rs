// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Parameters and capabilities of the next migration. The names are those of QEMU where QEMU has one.

use std::time::Duration;

use guest_migration::precopy;
use guest_migration::stream::CHANNELS_MAX;
use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;

/// Why parameters or capabilities cannot be set. None was changed.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum ParameterError {
    /// No parameter has this name.
    #[error("parameter '{name}' is unknown; known parameters: {}", NAMES.join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// The value is not a number, or is out of range.
    #[error("parameter '{name}' expects an integer from {min} to {max} ({unit})")]
    Number {
        /// The parameter.
        name: &'static str,
        /// The smallest valid value.
        min: u64,
        /// The largest valid value.
        max: u64,
        /// The unit of the value.
        unit: &'static str,
    },
    /// The value is neither true nor false.
    #[error("parameter '{0}' expects true or false")]
    Switch(&'static str),
    /// The value is not one of the choices.
    #[error("parameter '{name}' expects one of {}", choices.join(", "))]
    Choice {
        /// The parameter.
        name: &'static str,
        /// The valid values.
        choices: &'static [&'static str],
    },
    /// No capability has this name.
    #[error("capability '{name}' is unknown; known capabilities: {}", MigrationCapabilities::NAMES.join(", "))]
    Capability {
        /// The name.
        name: String,
    },
}

const NAMES: [&str; 11] = [
    "max-bandwidth",
    "downtime-limit",
    "multifd-channels",
    "multifd-compression",
    "multifd-zstd-level",
    "zero-page-detection",
    "max-rounds",
    "free-page-hint",
    "free-page-hint-wait",
    "dirty-tracking",
    "verify",
];

/// Compression of pages.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// No compression.
    None,
    /// Compression with zstd.
    Zstd,
}

/// How zero pages are detected.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroPageDetection {
    /// Only holes of the memory files are sent as zero pages.
    None,
    /// Pages are read to detect zero pages.
    Multifd,
}

/// How writes of the guest are detected.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyTracking {
    /// By soft-dirty bits if the kernel has them, otherwise by content.
    Auto,
    /// By the soft-dirty bits of every process that maps guest memory.
    SoftDirty,
    /// By comparing each page with the content that was sent.
    Content,
}

/// Parameters that `query-migrate-parameters` returns and `migrate-set-parameters` sets.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Limit of the bandwidth while the guest runs, in bytes per second. 0 means no limit.
    pub max_bandwidth: u64,
    /// The guest is paused once the remaining pages can be sent in this time, in milliseconds.
    pub downtime_limit: u64,
    /// Number of connections that send pages.
    pub multifd_channels: u16,
    /// Compression of pages.
    pub multifd_compression: Compression,
    /// Level of zstd compression.
    pub multifd_zstd_level: u8,
    /// How zero pages are detected.
    pub zero_page_detection: ZeroPageDetection,
    /// The guest is paused after this number of iterations, whatever number of pages remains.
    pub max_rounds: u32,
    /// Whether to ask the guest for its free pages, where that is sound.
    pub free_page_hint: bool,
    /// Timeout for the guest's hints, for all iterations together, in milliseconds (R14).
    pub free_page_hint_wait: u64,
    /// How writes of the guest are detected.
    pub dirty_tracking: DirtyTracking,
    /// Whether to compare each page with the content that was sent, while the guest is paused.
    pub verify: bool,
}

impl Default for MigrationParameters {
    fn default() -> Self {
        Self {
            max_bandwidth: 0,
            downtime_limit: 300,
            multifd_channels: 1,
            multifd_compression: Compression::None,
            multifd_zstd_level: 1,
            zero_page_detection: ZeroPageDetection::Multifd,
            max_rounds: 10,
            free_page_hint: true,
            free_page_hint_wait: 2000,
            dirty_tracking: DirtyTracking::Auto,
            verify: false,
        }
    }
}

impl MigrationParameters {
    /// Sets the parameters in `values`: all of them or none.
    ///
    /// # Errors
    ///
    /// The first parameter that does not exist or has an invalid value.
    pub fn set(&mut self, values: &Map<String, Value>) -> Result<(), ParameterError> {
        let mut new = self.clone();
        for (name, value) in values {
            new.set_one(name, value)?;
        }
        *self = new;
        Ok(())
    }

    fn set_one(&mut self, name: &str, value: &Value) -> Result<(), ParameterError> {
        match name {
            "max-bandwidth" => {
                self.max_bandwidth = number(
                    "max-bandwidth",
                    value,
                    0,
                    u64::MAX,
                    "bytes per second; 0 means no limit",
                )?;
            }
            // QEMU's limit.
            "downtime-limit" => {
                self.downtime_limit = number("downtime-limit", value, 0, 2_000_000, "ms")?;
            }
            "multifd-channels" => {
                self.multifd_channels = number(
                    "multifd-channels",
                    value,
                    1,
                    CHANNELS_MAX.into(),
                    "connections",
                )?;
            }
            "multifd-compression" => {
                self.multifd_compression = choice(
                    "multifd-compression",
                    value,
                    &["none", "zstd"],
                    &[Compression::None, Compression::Zstd],
                )?;
            }
            "multifd-zstd-level" => {
                self.multifd_zstd_level =
                    number("multifd-zstd-level", value, 1, 20, "level of zstd")?;
            }
            "zero-page-detection" => {
                self.zero_page_detection = choice(
                    "zero-page-detection",
                    value,
                    &["none", "multifd"],
                    &[ZeroPageDetection::None, ZeroPageDetection::Multifd],
                )?;
            }
            "max-rounds" => {
                self.max_rounds = number("max-rounds", value, 1, u32::MAX.into(), "iterations")?;
            }
            "free-page-hint" => self.free_page_hint = switch("free-page-hint", value)?,
            "free-page-hint-wait" => {
                self.free_page_hint_wait = number("free-page-hint-wait", value, 0, 600_000, "ms")?;
            }
            "dirty-tracking" => {
                self.dirty_tracking = choice(
                    "dirty-tracking",
                    value,
                    &["auto", "soft-dirty", "content"],
                    &[
                        DirtyTracking::Auto,
                        DirtyTracking::SoftDirty,
                        DirtyTracking::Content,
                    ],
                )?;
            }
            "verify" => self.verify = switch("verify", value)?,
            _ => {
                let name = name.chars().take(64).collect();
                return Err(ParameterError::Unknown { name });
            }
        }
        Ok(())
    }

    /// Returns the parameters in the form that [`precopy`] needs.
    pub fn to_precopy(&self, capabilities: MigrationCapabilities) -> precopy::Parameters {
        precopy::Parameters {
            max_bandwidth: self.max_bandwidth,
            downtime_limit: Duration::from_millis(self.downtime_limit),
            max_rounds: self.max_rounds,
            hint_wait: Duration::from_millis(self.free_page_hint_wait),
            zero_page_detection: self.zero_page_detection == ZeroPageDetection::Multifd,
            postcopy: capabilities.postcopy_ram,
            pause_before_switchover: capabilities.pause_before_switchover,
        }
    }
}

fn number<T: TryFrom<u64>>(
    name: &'static str,
    value: &Value,
    min: u64,
    max: u64,
    unit: &'static str,
) -> Result<T, ParameterError> {
    value
        .as_u64()
        .filter(|number| (min..=max).contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or(ParameterError::Number {
            name,
            min,
            max,
            unit,
        })
}

fn switch(name: &'static str, value: &Value) -> Result<bool, ParameterError> {
    value.as_bool().ok_or(ParameterError::Switch(name))
}

fn choice<T: Copy>(
    name: &'static str,
    value: &Value,
    choices: &'static [&'static str],
    values: &[T],
) -> Result<T, ParameterError> {
    let text = value.as_str();
    choices
        .iter()
        .zip(values)
        .find(|(choice, _)| Some(**choice) == text)
        .map(|(_, value)| *value)
        .ok_or(ParameterError::Choice { name, choices })
}

/// Capabilities that `query-migrate-capabilities` returns and `migrate-set-capabilities` sets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MigrationCapabilities {
    /// Run the guest at the destination before all pages are there. Migrations refuse this capability: post-copy is
    /// not implemented, and hints would make it unsound (R7).
    pub postcopy_ram: bool,
    /// Wait for `migrate-continue` before the switchover. The QMP client pauses the guest.
    pub pause_before_switchover: bool,
}

impl MigrationCapabilities {
    const NAMES: [&'static str; 2] = ["postcopy-ram", "pause-before-switchover"];

    /// Returns each capability with its name.
    pub fn all(self) -> [(&'static str, bool); 2] {
        let [postcopy, pause] = Self::NAMES;
        [
            (postcopy, self.postcopy_ram),
            (pause, self.pause_before_switchover),
        ]
    }

    /// Sets the capabilities in `states`: all of them or none.
    ///
    /// # Errors
    ///
    /// The first capability that does not exist.
    pub fn set<'a>(
        &mut self,
        states: impl IntoIterator<Item = (&'a str, bool)>,
    ) -> Result<(), ParameterError> {
        let mut new = *self;
        for (name, state) in states {
            match name {
                "postcopy-ram" => new.postcopy_ram = state,
                "pause-before-switchover" => new.pause_before_switchover = state,
                _ => {
                    let name = name.chars().take(64).collect();
                    return Err(ParameterError::Capability { name });
                }
            }
        }
        *self = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(parameters: &mut MigrationParameters, values: Value) -> Result<(), String> {
        let values = values.as_object().unwrap();
        parameters.set(values).map_err(|error| error.to_string())
    }

    #[test]
    fn every_parameter_can_be_set_to_what_it_shows() {
        let mut parameters = MigrationParameters::default();
        let shown = serde_json::to_value(&parameters).unwrap();
        let names: Vec<_> = shown.as_object().unwrap().keys().cloned().collect();
        let mut known = NAMES.to_vec();
        known.sort_unstable();
        assert_eq!(names, known);
        set(&mut parameters, shown).unwrap();
        assert_eq!(parameters, MigrationParameters::default());
        let other = json!({
            "max-bandwidth": 1, "downtime-limit": 2, "multifd-channels": 3, "multifd-compression": "zstd",
            "multifd-zstd-level": 4, "zero-page-detection": "none", "max-rounds": 5, "free-page-hint": false,
            "free-page-hint-wait": 6, "dirty-tracking": "content", "verify": true,
        });
        set(&mut parameters, other.clone()).unwrap();
        assert_eq!(serde_json::to_value(&parameters).unwrap(), other);
    }

    #[test]
    fn an_error_names_the_parameter_and_its_range_and_nothing_changes() {
        for (name, value, word) in [
            (
                "downtime-limit",
                json!(2_000_001),
                "'downtime-limit' expects an integer from 0 to 2000000 (ms)",
            ),
            ("max-bandwidth", json!(-1), "from 0 to 18446744073709551615"),
            ("max-rounds", json!(0), "from 1 to 4294967295"),
            ("multifd-channels", json!(65), "from 1 to 64"),
            ("multifd-zstd-level", json!("1"), "from 1 to 20"),
            (
                "free-page-hint",
                json!(1),
                "'free-page-hint' expects true or false",
            ),
            (
                "dirty-tracking",
                json!("kvm"),
                "expects one of auto, soft-dirty, content",
            ),
            (
                "multifd-compression",
                json!(null),
                "expects one of none, zstd",
            ),
            (
                "wings",
                json!(2),
                "'wings' is unknown; known parameters: max-bandwidth, ",
            ),
        ] {
            let mut parameters = MigrationParameters::default();
            let values = json!({ "verify": true, name: value, "zz": 0 });
            let error = set(&mut parameters, values).unwrap_err();
            assert!(error.contains(word), "{error}");
            assert_eq!(parameters, MigrationParameters::default());
        }
    }

    #[test]
    fn capabilities_are_switched_by_name() {
        let mut capabilities = MigrationCapabilities::default();
        capabilities
            .set([("pause-before-switchover", true)])
            .unwrap();
        let expected = [("postcopy-ram", false), ("pause-before-switchover", true)];
        assert_eq!(capabilities.all(), expected);
        let error = capabilities.set([("postcopy-ram", true), ("xbzrle", true)]);
        assert!(error
            .unwrap_err()
            .to_string()
            .contains("'xbzrle' is unknown; known capabilities: postcopy-ram"));
        assert_eq!(capabilities.all(), expected);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Selects the dirty tracker of a migration, and whether hints are used with it.

use serde::{Deserialize, Serialize};

use super::{ContentTracker, DirtyTracker, PunchedPages, Quiesce, SoftDirtyTracker, TrackingError};
use crate::Memory;

/// The requested tracking mode: the parameter `dirty-tracking`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackingMode {
    /// Soft-dirty bits if they are available, otherwise comparison of content.
    #[default]
    Auto,
    /// Soft-dirty bits.
    SoftDirty,
    /// Comparison of content.
    Content,
}

/// The selected tracker.
pub struct TrackerChoice {
    /// The tracker, which is not started yet.
    pub tracker: Box<dyn DirtyTracker>,
    /// Whether to ask the guest for hints.
    pub use_hints: bool,
    /// The selection and its reason, in one or two sentences for the user.
    pub why: String,
}

/// Selects a tracker for `memory`.
///
/// `hints` states whether hints are wanted. `discards` states whether the source of hints makes hinted pages zero
/// ([`HintSource::discards`](crate::HintSource::discards)). If the tracker needs this and the source does not do it,
/// hints are not used. `punched` and `quiesce` are for [`SoftDirtyTracker`].
///
/// # Errors
///
/// If the requested mode is not available.
pub fn choose_tracker(
    request: TrackingMode,
    hints: bool,
    discards: bool,
    memory: &Memory,
    punched: &PunchedPages,
    quiesce: Box<dyn Quiesce>,
) -> Result<TrackerChoice, TrackingError> {
    let soft_dirty = || SoftDirtyTracker::new(memory.clone(), punched.clone(), quiesce);
    let (tracker, reason): (Box<dyn DirtyTracker>, _) = match request {
        TrackingMode::SoftDirty => (Box::new(soft_dirty()?), "as requested".into()),
        TrackingMode::Content => (
            Box::new(ContentTracker::new(memory.clone())?),
            "as requested".into(),
        ),
        TrackingMode::Auto => match soft_dirty() {
            Ok(tracker) => (Box::new(tracker), "which the kernel supports".into()),
            Err(error) => (
                Box::new(ContentTracker::new(memory.clone())?),
                format!("because soft-dirty bits are not available: {error}"),
            ),
        },
    };
    let (use_hints, about_hints) = with_hints(tracker.as_ref(), hints, discards);
    let way = match tracker.name() {
        "soft-dirty" => "soft-dirty bits",
        _ => "content hashes",
    };
    let why = format!("dirty tracking uses {way}, {reason}; {about_hints}");
    Ok(TrackerChoice {
        tracker,
        use_hints,
        why,
    })
}

/// Returns whether hints are used with this tracker, and a clause that states why.
fn with_hints(tracker: &dyn DirtyTracker, wanted: bool, discards: bool) -> (bool, &'static str) {
    match (wanted, tracker.hints_need_discard(), discards) {
        (false, ..) => (false, "hints are disabled"),
        (true, false, _) => (true, "hints are used"),
        (true, true, true) => (
            true,
            "hints are used because the device discards hinted pages",
        ),
        (true, true, false) => (
            false,
            "hints are ignored because the device does not discard hinted pages, and a reused page with its old content would \
             not be detected: start the daemon with --discard-hinted",
        ),
    }
}

impl std::fmt::Debug for TrackerChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrackerChoice")
            .field("tracker", &self.tracker.name())
            .field("use_hints", &self.use_hints)
            .field("why", &self.why)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty_tracking::{mock_tracker, test_memory, NoWriters};

    fn chosen(
        request: TrackingMode,
        hints: bool,
        discards: bool,
    ) -> Result<TrackerChoice, TrackingError> {
        let memory = test_memory(&[4]);
        let punched = PunchedPages::new(memory.layout()).unwrap();
        let quiesce = Box::new(NoWriters);
        choose_tracker(request, hints, discards, &memory, &punched, quiesce)
    }

    #[test]
    fn comparison_without_discarding_ignores_hints_and_says_so() {
        let choice = chosen(TrackingMode::Content, true, false).unwrap();
        assert_eq!(
            (choice.tracker.name(), choice.use_hints),
            ("content", false)
        );
        assert!(choice.why.contains("hints are ignored"), "{}", choice.why);
        let choice = chosen(TrackingMode::Content, true, true).unwrap();
        assert!(choice.use_hints && choice.why.contains("hints are used"));
        let choice = chosen(TrackingMode::Content, false, true).unwrap();
        assert!(!choice.use_hints && choice.why.contains("hints are disabled"));
    }

    #[test]
    fn a_tracker_that_sees_writes_has_hints_from_any_source() {
        let (tracker, _) = mock_tracker();
        assert_eq!(with_hints(&tracker, true, false), (true, "hints are used"));
        assert!(!with_hints(&tracker, false, false).0);
    }

    #[test]
    fn what_is_not_to_be_had_is_refused_or_replaced_with_the_reason() {
        // No other process maps this memory, so soft-dirty bits are unavailable on every kernel.
        let refused = chosen(TrackingMode::SoftDirty, true, false).unwrap_err();
        let choice = chosen(TrackingMode::Auto, true, false).unwrap();
        assert_eq!(choice.tracker.name(), "content");
        assert!(choice.why.contains(&refused.to_string()), "{}", choice.why);
    }

    #[test]
    fn requests_have_the_names_of_the_parameter() {
        let names = ["\"auto\"", "\"soft-dirty\"", "\"content\""];
        let all = [
            TrackingMode::Auto,
            TrackingMode::SoftDirty,
            TrackingMode::Content,
        ];
        for (request, name) in all.iter().zip(names) {
            assert_eq!(serde_json::to_string(request).unwrap(), name);
            assert_eq!(
                serde_json::from_str::<TrackingMode>(name).unwrap(),
                *request
            );
        }
    }
}

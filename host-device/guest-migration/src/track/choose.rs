// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which tracker a migration has, and whether hints count with it.

use serde::{Deserialize, Serialize};

use super::{Content, DirtyTracker, Punched, Quiesce, SoftDirty, TrackError};
use crate::Memory;

/// The tracker that is asked for: the parameter `dirty-tracking`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Soft-dirty bits where they are to be had, else comparison.
    #[default]
    Auto,
    /// Soft-dirty bits.
    SoftDirty,
    /// Comparison of content.
    Content,
}

/// What was chosen.
pub struct Choice {
    /// The tracker. It has not begun.
    pub tracker: Box<dyn DirtyTracker>,
    /// Whether the guest is to be asked for hints.
    pub hints: bool,
    /// What was chosen and why, for operators: a sentence or two.
    pub why: String,
}

/// Chooses a tracker for `memory`.
///
/// `hints` says whether hints are wanted, and `discards` whether their source makes hinted pages zero
/// ([`HintSource::discards`](crate::HintSource::discards)): where the tracker needs that and has it not, hints are left out.
/// `punched` and `quiesce` are for [`SoftDirty`].
///
/// # Errors
///
/// If what is asked for is not to be had.
pub fn choose(
    request: Request,
    hints: bool,
    discards: bool,
    memory: &Memory,
    punched: &Punched,
    quiesce: Box<dyn Quiesce>,
) -> Result<Choice, TrackError> {
    let soft_dirty = || SoftDirty::new(memory.clone(), punched.clone(), quiesce);
    let (tracker, reason): (Box<dyn DirtyTracker>, _) = match request {
        Request::SoftDirty => (Box::new(soft_dirty()?), "as was asked for".into()),
        Request::Content => (
            Box::new(Content::new(memory.clone())?),
            "as was asked for".into(),
        ),
        Request::Auto => match soft_dirty() {
            Ok(tracker) => (Box::new(tracker), "which the kernel has".into()),
            Err(error) => (
                Box::new(Content::new(memory.clone())?),
                format!("since soft-dirty bits are not to be had: {error}"),
            ),
        },
    };
    let (hints, about_hints) = with_hints(tracker.as_ref(), hints, discards);
    let way = match tracker.name() {
        "soft-dirty" => "soft-dirty bits",
        _ => "comparison of content",
    };
    let why = format!("writes are tracked by {way}, {reason}; {about_hints}");
    Ok(Choice {
        tracker,
        hints,
        why,
    })
}

/// Whether hints count with this tracker, and a clause that says so.
fn with_hints(tracker: &dyn DirtyTracker, wanted: bool, discards: bool) -> (bool, &'static str) {
    match (wanted, tracker.hints_need_discard(), discards) {
        (false, ..) => (false, "no hints are wanted"),
        (true, false, _) => (true, "hints count"),
        (true, true, true) => (
            true,
            "hints count, since the device makes hinted pages zero",
        ),
        (true, true, false) => (
            false,
            "hints are ignored, since the device does not make hinted pages zero: one that is used again with the bytes that \
             it had would not show",
        ),
    }
}

impl std::fmt::Debug for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Choice")
            .field("tracker", &self.tracker.name())
            .field("hints", &self.hints)
            .field("why", &self.why)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::{driven, test_memory, NeverWrites};

    fn chosen(request: Request, hints: bool, discards: bool) -> Result<Choice, TrackError> {
        let memory = test_memory(&[4]);
        let punched = Punched::new(memory.layout()).unwrap();
        let quiesce = Box::new(NeverWrites);
        choose(request, hints, discards, &memory, &punched, quiesce)
    }

    #[test]
    fn comparison_without_discarding_ignores_hints_and_says_so() {
        let choice = chosen(Request::Content, true, false).unwrap();
        assert_eq!((choice.tracker.name(), choice.hints), ("content", false));
        assert!(choice.why.contains("hints are ignored"), "{}", choice.why);
        let choice = chosen(Request::Content, true, true).unwrap();
        assert!(choice.hints && choice.why.contains("hints count"));
        let choice = chosen(Request::Content, false, true).unwrap();
        assert!(!choice.hints && choice.why.contains("no hints are wanted"));
    }

    #[test]
    fn a_tracker_that_sees_writes_has_hints_from_any_source() {
        let (tracker, _) = driven();
        assert_eq!(with_hints(&tracker, true, false), (true, "hints count"));
        assert!(!with_hints(&tracker, false, false).0);
    }

    #[test]
    fn what_is_not_to_be_had_is_refused_or_replaced_with_the_reason() {
        // Nobody but us maps this memory, so there are no bits, whatever the kernel has.
        let refused = chosen(Request::SoftDirty, true, false).unwrap_err();
        let choice = chosen(Request::Auto, true, false).unwrap();
        assert_eq!(choice.tracker.name(), "content");
        assert!(choice.why.contains(&refused.to_string()), "{}", choice.why);
    }

    #[test]
    fn requests_have_the_names_of_the_parameter() {
        let names = ["\"auto\"", "\"soft-dirty\"", "\"content\""];
        let all = [Request::Auto, Request::SoftDirty, Request::Content];
        for (request, name) in all.iter().zip(names) {
            assert_eq!(serde_json::to_string(request).unwrap(), name);
            assert_eq!(serde_json::from_str::<Request>(name).unwrap(), *request);
        }
    }
}

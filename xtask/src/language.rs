// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Holds names and prose to `docs/glossary.md`.
//!
//! Names must not contain words that the glossary replaces. Comments, literals of characters and documents must not contain idioms that
//! are hard to read.

use std::fs;

use anyhow::{ensure, Context, Result};
use regex::Regex;

use crate::paths;
use crate::same_code::tokens::{self, Kind};
use crate::same_code::Renames;
use crate::sources;

/// Words that no name contains, and the glossary's term.
const FORBIDDEN: [(&str, &str); 24] = [
    ("balance", "page_counts"),
    ("complaint", "guest_errors"),
    ("complaints", "guest_errors"),
    ("harvest", "free_block_allocator"),
    ("lending", "migration_claim"),
    ("lent", "hinted"),
    ("mapper", "mapping_process"),
    ("mappers", "processes"),
    ("mover", "live_migration"),
    ("obey", "handle_cmd_id"),
    ("operator", "qmp_client"),
    ("operators", "qmp_clients"),
    ("patience", "timeout"),
    ("patient", "timeout"),
    ("rescue", "oom_deflate"),
    ("sins", "guest_errors"),
    ("steer", "update_size"),
    ("survey", "preflight"),
    ("traffic", "balloon_queues, in_flight"),
    ("trouble", "invalidated"),
    ("undo", "rollback"),
    ("unnoticed", "pending_kick"),
    ("untold", "pending_kick"),
    ("world", "peer, connections"),
];

/// Idioms of prose, as regular expressions.
const IDIOMS: [&str; 20] = [
    r"[Ww]hoever",
    r"to be had",
    r"lest",
    r"in vain",
    r"(?:is|are|was|were) (?:there )?no more",
    r"(?:goes|go|went|gone|going) on",
    r"stands? still|stood still|standing still",
    r"bears?|borne",
    r"[Nn]obody",
    r"by itself|by themselves",
    r"as (?:it|they) (?:was|were)",
    r"(?:is|are) to (?:be|have|go)",
    r"patience",
    r"who (?:waits|asks|looks|steers|tells)",
    r"so many (?:that|bytes|pages)",
    r"(?:comes?|coming|came) back",
    r"shall",
    r"himself",
    r"in the midst",
    r"[Oo]perators?",
];

/// Checks names and prose, and prints how many files it has checked.
///
/// # Errors
///
/// If a name contains a forbidden word, or prose an idiom.
pub fn check() -> Result<()> {
    let repository = paths::repository()?;
    let idioms = idioms()?;
    let mut found = Vec::new();
    let mut count = 0;
    for name in sources::names(&repository)? {
        let name = name.as_str();
        if !is_ours(name) {
            continue;
        }
        let path = repository.join(name);
        count += 1;
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {name}"))?;
        let of_path = words(name)
            .into_iter()
            .filter_map(|word| replacement(&word));
        found.extend(of_path.map(|term| format!("{name}: rename the file: {term}")));
        if name.ends_with(".rs") {
            found.extend(forbidden(name, &text)?);
        }
        for (line, text) in prose(name, &text)? {
            let hits = idioms.find_iter(&text);
            found.extend(hits.map(|hit| format!("{name}:{line}: rewrite \"{}\"", hit.as_str())));
        }
    }
    println!("{count:>5}  files in the terms of docs/glossary.md");
    ensure!(
        found.is_empty(),
        "names and prose against docs/glossary.md:\n{}",
        found.join("\n")
    );
    Ok(())
}

fn idioms() -> Result<Regex> {
    let any = IDIOMS.join("|");
    Regex::new(&format!(r"\b(?:{any})\b")).context("cannot read the idioms")
}

/// Whether the file is prose or code of this repository, and not the list of words itself.
fn is_ours(name: &str) -> bool {
    const ENDS: [&str; 5] = [".rs", ".md", ".c", ".h", ".sh"];
    ENDS.iter().any(|end| name.ends_with(end)) && name != "xtask/src/language.rs"
}

fn replacement(word: &str) -> Option<&'static str> {
    let found = FORBIDDEN.iter().find(|(forbidden, _)| *forbidden == word);
    found.map(|(_, term)| *term)
}

/// Returns the words of a name or a path, in lower case.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut was_lower = false;
    for character in name.chars() {
        let starts = !character.is_alphanumeric() || (character.is_uppercase() && was_lower);
        if starts {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut().filter(|_| character.is_alphanumeric()) {
            word.extend(character.to_lowercase());
        }
        was_lower = character.is_lowercase();
    }
    words
}

fn forbidden(name: &str, text: &str) -> Result<Vec<String>> {
    let tokens = tokens::parse(text, &Renames::default(), name).context(name.to_owned())?;
    let mut found = Vec::new();
    for token in tokens {
        let Kind::Word(identifier) = &token.kind else {
            continue;
        };
        for word in words(identifier) {
            if let Some(term) = replacement(&word) {
                found.push(format!("{name}:{}: {identifier}: use {term}", token.line));
            }
        }
    }
    Ok(found)
}

/// Returns what people read of a file, with its lines: comments and literals of code, everything of other files.
fn prose(name: &str, text: &str) -> Result<Vec<(usize, String)>> {
    let lines = text.lines().enumerate();
    let lines = lines.map(|(index, line)| (index + 1, line));
    if !name.ends_with(".rs") {
        return Ok(lines.map(|(line, text)| (line, text.to_owned())).collect());
    }
    let tokens = tokens::parse(text, &Renames::default(), name).context(name.to_owned())?;
    let literals = tokens.into_iter().filter_map(|token| match token.kind {
        Kind::Text(text) => Some((token.line, text)),
        _ => None,
    });
    let comments =
        lines.filter_map(|(line, text)| Some((line, text.split_once("//")?.1.to_owned())));
    Ok(literals.chain(comments).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_split_into_its_words() {
        let name = words("LentBlock_ofA");
        assert_eq!(name, ["", "lent", "block", "of", "a"][1..]);
        let found = forbidden("x.rs", "fn equivalent(lent_page: u8) { obey(\"lent\") }").unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn idioms_are_found_in_comments_and_literals_only() {
        let text = "// It goes on.\nfn goes() -> &'static str { \"nobody\" }\n";
        let idioms = idioms().unwrap();
        let found: usize = prose("x.rs", text)
            .unwrap()
            .iter()
            .map(|(_, text)| idioms.find_iter(text).count())
            .sum();
        assert_eq!(found, 2);
    }
}

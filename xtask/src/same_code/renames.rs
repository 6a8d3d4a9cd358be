// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A table of renames.

use std::collections::{BTreeMap, HashMap};

/// Renames of identifiers and files.
#[derive(Default)]
pub struct Renames {
    /// Renames of identifiers by the old name.
    identifiers: HashMap<String, Vec<Rename>>,
    /// New paths of files by the old paths.
    pub files: BTreeMap<String, String>,
}

struct Rename {
    /// The file or folder in which the rename applies; empty for all.
    scope: String,
    /// The names that may replace the old one. With several names, each place may have any of them.
    new: Vec<String>,
}

impl Rename {
    fn holds_in(&self, path: &str) -> bool {
        let scope = self.scope.trim_end_matches('/');
        let within = path.strip_prefix(scope);
        scope.is_empty() || within.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl Renames {
    /// Parses a table of renames. Tabs separate the columns of a line: `ident`, the old name, new names separated by
    /// `|`, and paths separated by spaces, or `*`; or `file`, the old path and the new path. Other lines are ignored,
    /// because a missing rename shows as a difference.
    pub fn parse(text: &str) -> Self {
        let mut all = Self::default();
        for line in text.lines() {
            let cells: Vec<_> = line.trim_start().split('\t').collect();
            match cells.as_slice() {
                ["ident", old, new, scopes, ..] => {
                    let scopes = scopes.split_whitespace().map(|scope| Rename {
                        scope: if scope == "*" { "" } else { scope }.to_owned(),
                        new: new.split('|').map(str::to_owned).collect(),
                    });
                    let known = all.identifiers.entry((*old).to_owned()).or_default();
                    known.extend(scopes);
                }
                ["file", old, new, ..] => {
                    all.files.insert((*old).to_owned(), (*new).to_owned());
                }
                _ => {}
            }
        }
        all
    }

    /// Returns the number of renamed identifiers, once for each path.
    pub fn count(&self) -> usize {
        self.identifiers.values().map(Vec::len).sum()
    }

    /// Returns the names that may replace `old` in the file at `path`. The rename with the narrowest scope applies.
    pub fn names(&self, old: &str, path: &str) -> Option<&[String]> {
        let all = self.identifiers.get(old)?.iter();
        let here = all.filter(|rename| rename.holds_in(path));
        let narrowest = here.max_by_key(|rename| rename.scope.len())?;
        Some(&narrowest.new)
    }

    /// Returns a string literal with new names for the arguments within its braces.
    pub fn in_format(&self, text: &str, path: &str) -> String {
        let mut renamed = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            renamed.push_str(before);
            renamed.push('{');
            let end = after.find(|c: char| !c.is_alphanumeric() && c != '_');
            let (name, tail) = after.split_at(end.unwrap_or(after.len()));
            let new = self.names(name, path).and_then(|names| names.first());
            renamed.push_str(new.map_or(name, String::as_str));
            rest = tail;
        }
        renamed.push_str(rest);
        renamed
    }
}

#[cfg(test)]
mod tests {
    use super::Renames;

    #[test]
    fn the_narrowest_scope_decides() {
        let table = "ident\tround\thint_round\t*\nident\tround\titeration|round\ta/b a/c\tnote\n";
        let renames = Renames::parse(table);
        assert_eq!(renames.names("round", "x.rs").unwrap(), ["hint_round"]);
        assert_eq!(
            renames.names("round", "a/c/x.rs").unwrap(),
            ["iteration", "round"]
        );
        assert_eq!(renames.names("round", "a/bc.rs").unwrap(), ["hint_round"]);
        assert_eq!(renames.names("block", "x.rs"), None);
        assert_eq!(renames.count(), 3);
    }

    #[test]
    fn arguments_in_literals_follow() {
        let renames = Renames::parse("ident\tround\titeration\t*\n");
        assert_eq!(
            renames.in_format("\"{round:?} of a round {round}\"", "x"),
            "\"{iteration:?} of a round {iteration}\""
        );
    }
}

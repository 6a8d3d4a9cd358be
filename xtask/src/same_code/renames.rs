// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A table of renames.

use std::collections::HashMap;

/// Renames by the old name.
#[derive(Default)]
pub struct Renames(HashMap<String, Vec<Rename>>);

struct Rename {
    /// The file or folder in which it holds; empty for all.
    scope: String,
    /// The names that may stand for the old one. With more than one, a person has decided at each place.
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
    /// Reads lines of `ident`, old name, new names separated by `|`, and paths separated by spaces or `*`, with tabs between them.
    /// Other lines are of no account: a rename that is missed is a difference.
    pub fn parse(text: &str) -> Self {
        let mut all = HashMap::<String, Vec<Rename>>::new();
        for line in text.lines() {
            let mut cells = line.trim_start().split('\t');
            if cells.next() != Some("ident") {
                continue;
            }
            let (Some(old), Some(new), Some(scopes)) = (cells.next(), cells.next(), cells.next())
            else {
                continue;
            };
            for scope in scopes.split_whitespace() {
                all.entry(old.to_owned()).or_default().push(Rename {
                    scope: if scope == "*" { "" } else { scope }.to_owned(),
                    new: new.split('|').map(str::to_owned).collect(),
                });
            }
        }
        Self(all)
    }

    /// Returns how many renames there are.
    pub fn count(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// Returns the names that may stand for `old` in the file at `path`, of the rename with the narrowest scope.
    pub fn names(&self, old: &str, path: &str) -> Option<&[String]> {
        let all = self.0.get(old)?.iter();
        let here = all.filter(|rename| rename.holds_in(path));
        let narrowest = here.max_by_key(|rename| rename.scope.len())?;
        Some(&narrowest.new)
    }

    /// Returns a literal of characters with new names of the arguments within its braces.
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

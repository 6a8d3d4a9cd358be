// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the tokens of a source file, without comments and layout.

use std::fmt;
use std::str::FromStr;

use anyhow::{anyhow, Result};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

use super::renames::Renames;

/// A token.
#[derive(Clone, Debug)]
pub struct Token {
    /// The kind, with the new name.
    pub kind: Kind,
    /// Other names that the token may have instead.
    pub others: Vec<String>,
    /// The line, counted from 1.
    pub line: usize,
}

impl Token {
    fn other(text: &str, line: usize) -> Self {
        Self {
            kind: Kind::Other(text.to_owned()),
            others: Vec::new(),
            line,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An identifier or a keyword.
    Word(String),
    /// A literal with quotation marks, as in the source.
    Text(String),
    /// Any other literal, punctuation, and the ends of a group.
    Other(String),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Word(text) | Self::Text(text) | Self::Other(text)) = self;
        f.write_str(text)
    }
}

/// Returns the tokens of a source file, without comments and with the names that `renames` has for the file at `path`.
/// The result does not depend on what rustfmt changes: commas before the end of a group, braces around the single
/// expression of a match arm or closure, and the order of adjacent `use` and `mod` items.
///
/// # Errors
///
/// Fails if the text is not Rust.
pub fn parse(text: &str, renames: &Renames, path: &str) -> Result<Vec<Token>> {
    let stream = TokenStream::from_str(text).map_err(|error| {
        let start = error.span().start();
        anyhow!("line {}: {error}", start.line)
    })?;
    Ok(Reader { renames, path }.flatten(stream))
}

struct Reader<'a> {
    renames: &'a Renames,
    path: &'a str,
}

impl Reader<'_> {
    fn flatten(&self, stream: TokenStream) -> Vec<Token> {
        let trees = without_doc(stream.into_iter().collect());
        let mut tokens = Vec::new();
        let mut rest = trees.as_slice();
        while !rest.is_empty() {
            let mut items = Vec::new();
            while let Some(length) = import_length(rest) {
                let (item, after) = rest.split_at(length);
                let mut item = self.flatten_plain(item);
                sort_list(&mut item);
                items.push(item);
                rest = after;
            }
            if items.is_empty() {
                let length = plain_length(rest);
                let (plain, after) = rest.split_at(length);
                tokens.extend(self.flatten_plain(plain));
                rest = after;
            } else {
                items.sort_by(|a, b| kinds(a).cmp(kinds(b)));
                tokens.extend(items.into_iter().flatten());
            }
        }
        tokens
    }

    fn flatten_plain(&self, trees: &[TokenTree]) -> Vec<Token> {
        let mut tokens: Vec<Token> = Vec::new();
        for (at, tree) in trees.iter().enumerate() {
            let line = tree.span().start().line;
            match tree {
                TokenTree::Ident(word) => tokens.push(self.word(&word.to_string(), line)),
                TokenTree::Literal(literal) => {
                    tokens.push(self.literal(&literal.to_string(), line))
                }
                TokenTree::Punct(punct) => {
                    let is_last = at + 1 == trees.len();
                    let after_braces = punct.as_char() == ','
                        && at > 1
                        && trees
                            .get(at - 1)
                            .is_some_and(|tree| is_body(tree, trees, at - 1));
                    if punct.as_char() != ',' || !(is_last || after_braces) {
                        tokens.push(Token::other(&punct.to_string(), line));
                    }
                }
                TokenTree::Group(group) if is_wrapper(group, trees, at) => {
                    tokens.extend(self.flatten(group.stream()));
                }
                TokenTree::Group(group) => {
                    let (open, close) = match group.delimiter() {
                        Delimiter::Parenthesis => ("(", ")"),
                        Delimiter::Brace => ("{", "}"),
                        Delimiter::Bracket => ("[", "]"),
                        Delimiter::None => ("", ""),
                    };
                    tokens.push(Token::other(open, line));
                    tokens.extend(self.flatten(group.stream()));
                    tokens.push(Token::other(close, group.span_close().start().line));
                }
            }
            // Every match arm with braces ends with a comma, whether the source has one or not.
            let more = trees
                .iter()
                .skip(at + 1)
                .any(|tree| !is_punct(Some(tree), ','));
            if more && is_body(tree, trees, at) {
                tokens.push(Token::other(",", line));
            }
        }
        tokens
    }

    fn word(&self, name: &str, line: usize) -> Token {
        let mut names = self
            .renames
            .names(name, self.path)
            .unwrap_or_default()
            .iter()
            .cloned();
        Token {
            kind: Kind::Word(names.next().unwrap_or_else(|| name.to_owned())),
            others: names.collect(),
            line,
        }
    }

    fn literal(&self, text: &str, line: usize) -> Token {
        if !text.contains('"') {
            return Token::other(text, line);
        }
        Token {
            kind: Kind::Text(self.renames.in_format(text, self.path)),
            others: Vec::new(),
            line,
        }
    }
}

fn kinds(tokens: &[Token]) -> impl Iterator<Item = &Kind> {
    tokens.iter().map(|token| &token.kind)
}

/// Returns the number of token trees before the next import, at least 1.
fn plain_length(trees: &[TokenTree]) -> usize {
    let starts = (1..trees.len()).find(|&start| {
        let after_item = match trees.get(start - 1) {
            Some(TokenTree::Punct(punct)) => matches!(punct.as_char(), ';'),
            Some(TokenTree::Group(_)) => true,
            _ => false,
        };
        after_item && trees.get(start..).and_then(import_length).is_some()
    });
    starts.unwrap_or(trees.len())
}

/// Returns the number of token trees of the `use` or `mod …;` item at the start, with its attributes; `None` if there
/// is no such item.
fn import_length(trees: &[TokenTree]) -> Option<usize> {
    let mut at = 0;
    while is_punct(trees.get(at), '#') && is_group(trees.get(at + 1), Delimiter::Bracket) {
        at += 2;
    }
    if is_word(trees.get(at), "pub") {
        at += 1;
        if is_group(trees.get(at), Delimiter::Parenthesis) {
            at += 1;
        }
    }
    if is_word(trees.get(at), "mod") {
        return is_punct(trees.get(at + 2), ';').then_some(at + 3);
    }
    if !is_word(trees.get(at), "use") {
        return None;
    }
    let end = trees
        .iter()
        .skip(at)
        .position(|tree| is_punct(Some(tree), ';'))?;
    Some(at + end + 1)
}

/// Sorts the entries between the braces of an import, at every depth.
fn sort_list(tokens: &mut Vec<Token>) {
    let Some(open) = kinds(tokens).position(|kind| *kind == Kind::Other("{".to_owned())) else {
        return;
    };
    let Some(close) = tokens
        .iter()
        .rposition(|token| token.kind == Kind::Other("}".to_owned()))
    else {
        return;
    };
    let mut entries: Vec<Vec<Token>> = vec![Vec::new()];
    let mut depth = 0_usize;
    for token in tokens.drain(open + 1..close) {
        match &token.kind {
            Kind::Other(text) if text == "{" => depth += 1,
            Kind::Other(text) if text == "}" => depth = depth.saturating_sub(1),
            Kind::Other(text) if text == "," && depth == 0 => {
                entries.push(Vec::new());
                continue;
            }
            _ => {}
        }
        if let Some(entry) = entries.last_mut() {
            entry.push(token);
        }
    }
    for entry in &mut entries {
        sort_list(entry);
    }
    entries.sort_by(|a, b| kinds(a).cmp(kinds(b)));
    let line = tokens.get(open).map_or(0, |token| token.line);
    let comma = Token::other(",", line);
    let sorted = entries.join(&comma);
    tokens.splice(open + 1..=open, sorted);
}

/// Removes `#[doc = …]` and `#![doc = …]`. Doc comments are parsed as these attributes, too.
fn without_doc(trees: Vec<TokenTree>) -> Vec<TokenTree> {
    let mut kept: Vec<TokenTree> = Vec::with_capacity(trees.len());
    for tree in trees {
        let is_doc = matches!(&tree, TokenTree::Group(group) if is_doc_attribute(group));
        if !is_doc {
            kept.push(tree);
            continue;
        }
        if is_punct(kept.last(), '!') {
            kept.pop();
        }
        if is_punct(kept.last(), '#') {
            kept.pop();
        }
    }
    kept
}

fn is_doc_attribute(group: &Group) -> bool {
    let mut trees = group.stream().into_iter();
    group.delimiter() == Delimiter::Bracket
        && is_word(trees.next().as_ref(), "doc")
        && is_punct(trees.next().as_ref(), '=')
}

/// Returns whether the tree is the braces after the arrow of a match arm.
fn is_body(tree: &TokenTree, trees: &[TokenTree], at: usize) -> bool {
    is_group(Some(tree), Delimiter::Brace)
        && at > 1
        && is_punct(trees.get(at - 1), '>')
        && is_punct(trees.get(at - 2), '=')
}

/// Returns whether the group is braces around the single expression of a match arm or a closure.
fn is_wrapper(group: &Group, trees: &[TokenTree], at: usize) -> bool {
    let Some(tree) = trees.get(at) else {
        return false;
    };
    let of_closure = at > 0 && is_punct(trees.get(at - 1), '|');
    let is_single = !group
        .stream()
        .into_iter()
        .any(|tree| is_punct(Some(&tree), ';'));
    group.delimiter() == Delimiter::Brace
        && (of_closure || is_body(tree, trees, at))
        && is_single
        && !group.stream().is_empty()
}

fn is_word(tree: Option<&TokenTree>, word: &str) -> bool {
    matches!(tree, Some(TokenTree::Ident(ident)) if ident == word)
}

fn is_punct(tree: Option<&TokenTree>, character: char) -> bool {
    matches!(tree, Some(TokenTree::Punct(punct)) if punct.as_char() == character)
}

fn is_group(tree: Option<&TokenTree>, delimiter: Delimiter) -> bool {
    matches!(tree, Some(TokenTree::Group(group)) if group.delimiter() == delimiter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(source: &str) -> String {
        renamed(source, "")
    }

    fn renamed(source: &str, renames: &str) -> String {
        let tokens = parse(source, &Renames::parse(renames), "a/x.rs").unwrap();
        let words: Vec<_> = tokens.iter().map(|token| token.kind.to_string()).collect();
        words.join(" ")
    }

    #[test]
    fn comments_are_dropped_and_other_attributes_are_kept() {
        let source = "//! Module.\n/// Item.\n#[doc(alias = \"x\")] // why\nfn f() {}\n";
        assert_eq!(text(source), "# [ doc ( alias = \"x\" ) ] fn f ( ) { }");
    }

    #[test]
    fn imports_are_sorted_by_their_new_names() {
        let before = "use a::{b, c};\nfn f() { println!(\"{c} of c\"); }";
        let after = "use a::{a, b};\nfn f() { println!(\"{a} of c\"); }";
        assert_eq!(renamed(before, "ident\tc\ta\ta/"), text(after));
    }

    #[test]
    fn layout_makes_no_difference() {
        let broken =
            "use b::{d, c};\nuse a::x;\nfn f() { g(1, 2,); match x { A => { h() } B => i(), } }";
        let joined =
            "use a::x;\nuse b::{c, d,};\nfn f() { g(1, 2); match x { A => h(), B => i() } }";
        assert_eq!(text(broken), text(joined));
    }

    #[test]
    fn a_changed_statement_makes_a_difference() {
        assert_ne!(text("fn f() { g(1); }"), text("fn f() { g(1) }"));
        assert_ne!(text("fn f() { a(); b(); }"), text("fn f() { b(); a(); }"));
        assert_ne!(text("mod a { use b; }"), text("mod a { use c; }"));
    }
}

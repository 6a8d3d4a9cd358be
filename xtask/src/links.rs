// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Checks the links between the documents, and that the book has all of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{ensure, Context, Result};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use crate::paths;
use crate::sources;

/// The table of contents of the book.
const SUMMARY: &str = "docs/SUMMARY.md";

/// Checks all Markdown files, and prints how many links they have.
///
/// # Errors
///
/// If a link leads to a file or a heading that does not exist, or a file below `docs` is not in the book.
pub fn check() -> Result<()> {
    let repository = paths::repository()?;
    let mut names = sources::names(&repository)?;
    names.retain(|name| name.ends_with(".md"));
    let mut count = 0;
    let mut broken = Vec::new();
    let mut in_book = BTreeSet::from([PathBuf::from(SUMMARY)]);
    for name in &names {
        let text = read(&repository.join(name))?;
        for link in parse(&text).links {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let (file, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target = target(name, file);
            if name == SUMMARY {
                in_book.insert(target.clone());
            }
            if !leads_somewhere(&repository, &target, heading)? {
                broken.push(format!("{name}: {link}"));
            }
        }
    }
    let documents = names.iter().filter(|name| name.starts_with("docs/"));
    for name in documents.filter(|name| !in_book.contains(Path::new(name))) {
        broken.push(format!("{name} is not in {SUMMARY}"));
    }
    println!("{count:>5}  links");
    ensure!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Returns the path in the repository that a link in the file `name` leads to.
fn target(name: &str, link: &str) -> PathBuf {
    let file = Path::new(name);
    if link.is_empty() {
        return file.to_owned();
    }
    let mut target = file.parent().map(Path::to_owned).unwrap_or_default();
    for component in Path::new(link).components() {
        match component {
            Component::ParentDir => {
                target.pop();
            }
            Component::Normal(part) => target.push(part),
            _ => {}
        }
    }
    target
}

fn leads_somewhere(repository: &Path, target: &Path, heading: &str) -> Result<bool> {
    let path = repository.join(target);
    if heading.is_empty() || path.extension().is_none_or(|end| end != "md") {
        return Ok(path.exists());
    }
    if !path.is_file() {
        return Ok(false);
    }
    let headings = parse(&read(&path)?).headings;
    Ok(headings.iter().any(|it| it == heading))
}

/// What a document has of links and of headings that links can lead to.
#[derive(Default)]
struct Document {
    links: Vec<String>,
    headings: Vec<String>,
}

fn parse(text: &str) -> Document {
    let mut document = Document::default();
    let mut heading = None;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                document.links.push(dest_url.into_string());
            }
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(part) | Event::Code(part) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&part);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                document
                    .headings
                    .extend(heading.take().as_deref().map(anchor));
            }
            _ => {}
        }
    }
    document
}

/// Returns the anchor that GitHub and mdBook give to a heading.
fn anchor(heading: &str) -> String {
    let kept = heading
        .trim()
        .chars()
        .filter_map(|character| match character {
            ' ' => Some('-'),
            '-' | '_' => Some(character),
            _ if character.is_alphanumeric() => Some(character),
            _ => None,
        });
    kept.flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_headings_are_found() {
        let text = "# The `vring`, and more\n\n[a](b.md#c) and ![p](p.svg)\n\n| x |\n|---|\n| [t](../t.md) |\n";
        let document = parse(text);
        assert_eq!(document.links, ["b.md#c", "p.svg", "../t.md"]);
        assert_eq!(document.headings, ["the-vring-and-more"]);
    }

    #[test]
    fn a_link_is_relative_to_its_file() {
        assert_eq!(target("docs/a.md", "../x/b.rs"), Path::new("x/b.rs"));
        assert_eq!(target("docs/a.md", ""), Path::new("docs/a.md"));
    }
}

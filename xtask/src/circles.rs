// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finds circles of imports between the files of a crate.
//!
//! A file depends on another if it names an item of it, by `use` or by a path that starts with `crate`, `self` or `super`. Re-exports
//! are followed to the file that defines the item. `mod` declarations and re-exports are no dependencies, and code for tests
//! (`#[cfg(test)]`) is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use syn::visit::Visit;
use syn::{Item, ItemMod, ItemUse, UseTree, Visibility};

use crate::paths;

/// The crates that have no circles.
const CRATES: [&str; 4] = [
    "host-device/balloonctl/src",
    "host-device/guest-migration/src",
    "host-device/qmp-client/src",
    "host-device/vhost-device-balloon/src",
];

/// The segments of a module path after `crate`.
type Module = Vec<String>;

/// Checks all crates, and prints how many files they have.
///
/// # Errors
///
/// If files depend on each other, with their names and the items.
pub fn check() -> Result<()> {
    let repository = paths::repository()?;
    let mut found = Vec::new();
    let mut files = 0;
    for name in CRATES {
        let sources = Sources::read(&repository.join(name))?;
        files += sources.files.len();
        found.extend(sources.circles());
    }
    println!("{files:>5}  files without a circle");
    ensure!(
        found.is_empty(),
        "files that depend on each other (move what both need to a file of its own):\n{}",
        found.join("\n")
    );
    Ok(())
}

/// The files of a crate.
struct Sources {
    files: BTreeMap<Module, Source>,
}

struct Source {
    name: String,
    /// Paths that the file names, from the root of the crate.
    used: BTreeSet<Module>,
    /// Items that are re-exported under a name, and where they are.
    exports: BTreeMap<String, Module>,
    /// Modules whose items are all re-exported.
    globs: Vec<Module>,
    /// Items that the file defines.
    defined: BTreeSet<String>,
}

impl Sources {
    fn read(root: &Path) -> Result<Self> {
        let mut sources = Self {
            files: BTreeMap::new(),
        };
        sources.read_folder(root, root)?;
        Ok(sources)
    }

    fn read_folder(&mut self, root: &Path, folder: &Path) -> Result<()> {
        let entries =
            fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                self.read_folder(root, &path)?;
                continue;
            }
            let name = path.strip_prefix(root).unwrap_or(&path);
            let Some(module) = module_of(name) else {
                continue;
            };
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let file = syn::parse_file(&text).with_context(|| format!("in {}", path.display()))?;
            if file.attrs.iter().any(is_for_tests) {
                continue;
            }
            let source = Reader::read(path.display().to_string(), &module, &file);
            self.files.insert(module, source);
        }
        Ok(())
    }

    /// Returns the file that defines what `path` names.
    fn definition(&self, path: &[String], depth: usize) -> Option<&Module> {
        let known = (0..=path.len()).rev().find_map(|length| {
            let (module, rest) = path.split_at(length);
            let (module, source) = self.files.get_key_value(module)?;
            Some((module, source, rest))
        });
        let (module, source, rest) = known?;
        let Some((item, inner)) = rest.split_first() else {
            return Some(module);
        };
        if depth == 0 || source.defined.contains(item) {
            return Some(module);
        }
        if let Some(target) = source.exports.get(item) {
            let target = [target.as_slice(), inner].concat();
            return self.definition(&target, depth - 1);
        }
        let from_glob = source.globs.iter().find_map(|glob| {
            let glob_source = self.files.get(glob)?;
            let is_there =
                glob_source.defined.contains(item) || glob_source.exports.contains_key(item);
            is_there.then(|| [glob.as_slice(), rest].concat())
        });
        match from_glob {
            Some(target) => self.definition(&target, depth - 1),
            None => Some(module),
        }
    }

    /// Returns the files that each file depends on, with an item for each.
    fn edges(&self) -> BTreeMap<&Module, BTreeMap<&Module, String>> {
        const DEPTH: usize = 8;
        let mut edges = BTreeMap::new();
        for (module, source) in &self.files {
            let mut targets = BTreeMap::<&Module, String>::new();
            for path in &source.used {
                let Some(target) = self.definition(path, DEPTH).filter(|it| *it != module) else {
                    continue;
                };
                let item = path.last().cloned().unwrap_or_default();
                let items = targets.entry(target).or_default();
                if !items.is_empty() {
                    items.push_str(", ");
                }
                items.push_str(&item);
            }
            edges.insert(module, targets);
        }
        edges
    }

    /// Returns a line for each dependency that is part of a circle.
    fn circles(&self) -> Vec<String> {
        let edges = self.edges();
        let reach: BTreeMap<_, _> = edges
            .keys()
            .map(|start| (*start, reachable(&edges, start)))
            .collect();
        let mut lines = Vec::new();
        for (from, targets) in &edges {
            for (to, items) in targets {
                if reach.get(to).is_some_and(|reached| reached.contains(from)) {
                    let name = |module: &Module| self.files.get(module).map(|it| it.name.as_str());
                    let (from, to) = (name(from), name(to));
                    lines.push(format!(
                        "  {} -> {}: {items}",
                        from.unwrap_or("?"),
                        to.unwrap_or("?")
                    ));
                }
            }
        }
        lines
    }
}

fn reachable<'a>(
    edges: &BTreeMap<&'a Module, BTreeMap<&'a Module, String>>,
    start: &Module,
) -> BTreeSet<&'a Module> {
    let mut reached = BTreeSet::new();
    let mut open: Vec<&Module> = edges
        .get(start)
        .into_iter()
        .flat_map(|it| it.keys().copied())
        .collect();
    while let Some(module) = open.pop() {
        if let Some((module, targets)) = edges.get_key_value(module) {
            if reached.insert(*module) {
                open.extend(targets.keys().copied());
            }
        }
    }
    reached
}

/// Returns the module that a file holds; `None` if it is not Rust.
fn module_of(name: &Path) -> Option<Module> {
    let name = name.to_str()?.strip_suffix(".rs")?;
    let mut module: Module = name.split('/').map(str::to_owned).collect();
    if matches!(
        module.last().map(String::as_str),
        Some("mod" | "lib" | "main")
    ) {
        module.pop();
    }
    Some(module)
}

fn is_for_tests(attribute: &syn::Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute
            .parse_args::<syn::Ident>()
            .is_ok_and(|name| name == "test")
}

/// Collects what a file names.
struct Reader {
    module: Module,
    source: Source,
}

impl Reader {
    fn read(name: String, module: &Module, file: &syn::File) -> Source {
        let mut reader = Self {
            module: module.clone(),
            source: Source {
                name,
                used: BTreeSet::new(),
                exports: BTreeMap::new(),
                globs: Vec::new(),
                defined: BTreeSet::new(),
            },
        };
        for item in &file.items {
            reader.source.defined.extend(name_of(item));
        }
        reader.visit_file(file);
        reader.source
    }

    /// Returns a path from the root of the crate; `None` if it leads out of it.
    fn absolute(&self, path: &[String]) -> Option<Module> {
        let (first, rest) = path.split_first()?;
        let mut module = match first.as_str() {
            "crate" => Vec::new(),
            "self" => self.module.clone(),
            "super" => {
                let mut module = self.module.clone();
                module.pop()?;
                module
            }
            _ => return None,
        };
        for segment in rest {
            if segment == "super" {
                module.pop()?;
            } else {
                module.push(segment.clone());
            }
        }
        Some(module)
    }

    fn add_use(&mut self, prefix: &mut Module, tree: &UseTree, is_export: bool) {
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.add_use(prefix, &path.tree, is_export);
                prefix.pop();
            }
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_use(prefix, tree, is_export);
                }
            }
            UseTree::Name(name) => self.add_leaf(prefix, &name.ident, &name.ident, is_export),
            UseTree::Rename(rename) => {
                self.add_leaf(prefix, &rename.ident, &rename.rename, is_export);
            }
            UseTree::Glob(_) => {
                let Some(target) = self.target(prefix) else {
                    return;
                };
                if is_export {
                    self.source.globs.push(target);
                } else {
                    self.source.used.insert(target);
                }
            }
        }
    }

    fn add_leaf(
        &mut self,
        prefix: &[String],
        name: &syn::Ident,
        new_name: &syn::Ident,
        is_export: bool,
    ) {
        let mut path = prefix.to_vec();
        if name != "self" {
            path.push(name.to_string());
        }
        let Some(target) = self.target(&path) else {
            return;
        };
        if is_export {
            self.source.exports.insert(new_name.to_string(), target);
        } else {
            self.source.used.insert(target);
        }
    }

    /// As [`Self::absolute`], and takes a path that starts with a module of this file for one of this crate.
    fn target(&self, path: &[String]) -> Option<Module> {
        self.absolute(path).or_else(|| {
            let first = path.first()?;
            let is_child = self.source.defined.contains(first);
            is_child.then(|| [self.module.as_slice(), path].concat())
        })
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if item.attrs.iter().any(is_for_tests) {
            return;
        }
        let is_export = !matches!(item.vis, Visibility::Inherited);
        self.add_use(&mut Vec::new(), &item.tree, is_export);
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if item.content.is_some() && !item.attrs.iter().any(is_for_tests) {
            self.module.push(item.ident.to_string());
            syn::visit::visit_item_mod(self, item);
            self.module.pop();
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Module = path
            .segments
            .iter()
            .map(|segment| segment.ident.to_string())
            .collect();
        let target = if segments.len() > 1 {
            self.target(&segments)
        } else {
            None
        };
        self.source.used.extend(target);
        syn::visit::visit_path(self, path);
    }
}

/// Returns the name of an item, if it has one.
fn name_of(item: &Item) -> Option<String> {
    let name = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Mod(item) => &item.ident,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        _ => return None,
    };
    Some(name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(module: &str, text: &str) -> (Module, Source) {
        let module: Module = module.split_whitespace().map(str::to_owned).collect();
        let file = syn::parse_file(text).unwrap();
        let source = Reader::read(module.join("/"), &module, &file);
        (module, source)
    }

    #[test]
    fn a_circle_is_found_through_a_re_export() {
        let files = BTreeMap::from([
            source("", "mod a; mod b; pub use a::A;"),
            source("a", "use crate::b::B; pub struct A;"),
            source("b", "use crate::A; pub struct B;"),
        ]);
        let lines = Sources { files }.circles();
        assert_eq!(lines, ["  a -> b: B", "  b -> a: A"]);
    }

    #[test]
    fn a_module_that_declares_and_re_exports_its_child_is_no_circle() {
        let files = BTreeMap::from([
            source("a", "mod b; pub use b::B; pub struct A;"),
            source("a b", "use super::A; pub struct B;"),
        ]);
        assert!(Sources { files }.circles().is_empty());
    }

    #[test]
    fn a_module_that_calls_its_child_is_a_circle_if_the_child_needs_it() {
        let files = BTreeMap::from([
            source("a", "mod b; pub struct A; fn f() { b::g(); }"),
            source(
                "a b",
                "pub fn g() { super::A; } #[cfg(test)] mod tests { use crate::x::Y; }",
            ),
        ]);
        let lines = Sources { files }.circles();
        assert_eq!(lines, ["  a -> a/b: g", "  a/b -> a: A"]);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shows that a change of comments, layout or names has changed no code.

mod renames;
pub mod tokens;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};

use crate::paths;
use crate::run;
pub use renames::Renames;
use tokens::{Kind, Token};

/// Arguments of `same-code`.
#[derive(clap::Args)]
pub struct Options {
    /// The commit to compare with
    base: String,
    /// The commit to compare, instead of the work tree (in which new files must be known to git)
    #[arg(long, value_name = "COMMIT")]
    to: Option<String>,
    /// Names that have changed: lines of `ident`, the old name, the new one (or several, with `|` between them), and the files and
    /// folders of the old commit in which it holds (or `*`); and of `file`, the old path and the new one. Tabs separate the columns
    #[arg(long, value_name = "FILE")]
    renames: Option<PathBuf>,
    /// Literals of characters may differ: counts them
    #[arg(long)]
    texts: bool,
    /// Only files whose path, before or after, starts with one of these
    #[arg(value_name = "PATH")]
    paths: Vec<String>,
}

/// Compares the Rust files of two states of the repository, token by token, without comments.
///
/// # Errors
///
/// Fails if a file differs. The error has the first difference of each file.
pub fn command(options: &Options) -> Result<()> {
    let repository = paths::repository()?;
    let renames = match &options.renames {
        Some(path) => {
            let text = fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Renames::parse(&text)
        }
        None => Renames::default(),
    };
    let side = |revision: Option<&str>| Side {
        repository: repository.clone(),
        revision: revision.map(str::to_owned),
    };
    let (old, new) = (side(Some(&options.base)), side(options.to.as_deref()));
    let mut moved = moves(&repository, options)?;
    moved.extend(renames.files.clone());
    let mut new_files = new.files()?;
    let mut totals = Totals::default();
    let mut differences = Vec::new();
    let wanted = |name: &str| {
        options.paths.is_empty() || options.paths.iter().any(|path| name.starts_with(path))
    };
    for name in old.files()? {
        let new_name = moved.get(&name).unwrap_or(&name).clone();
        let is_there = new_files
            .iter()
            .position(|file| *file == new_name)
            .map(|at| new_files.swap_remove(at));
        if !wanted(&name) && !wanted(&new_name) {
            continue;
        }
        if is_there.is_none() {
            differences.push(format!("{name}: only in {}", options.base));
            continue;
        }
        let before = tokens::parse(&old.read(&name)?, &renames, &name).context(name.clone())?;
        let after = tokens::parse(&new.read(&new_name)?, &Renames::default(), &new_name)
            .context(new_name.clone())?;
        totals.files += 1;
        totals.moved += usize::from(name != new_name);
        if let Err(difference) = totals.compare(&before, &after, options.texts) {
            differences.push(format!("{new_name}: {difference}"));
        }
    }
    let added = new_files.into_iter().filter(|name| wanted(name));
    differences.extend(added.map(|name| format!("{name}: not in {}", options.base)));
    println!(
        "{} files ({} moved), {} tokens, {} renames, {} literals of characters differ",
        totals.files,
        totals.moved,
        totals.tokens,
        renames.count(),
        totals.texts
    );
    ensure!(
        differences.is_empty(),
        "{} files differ:\n{}",
        differences.len(),
        differences.join("\n")
    );
    println!("the code is the same");
    Ok(())
}

/// A state of the repository: a commit, or the work tree.
struct Side {
    repository: PathBuf,
    revision: Option<String>,
}

impl Side {
    fn files(&self) -> Result<Vec<String>> {
        let mut git = git(&self.repository);
        match &self.revision {
            Some(revision) => git.args(["ls-tree", "-r", "--name-only", revision]),
            None => git.arg("ls-files"),
        };
        let names = run::output(&mut git)?;
        let rust = names.lines().filter(|name| name.ends_with(".rs"));
        Ok(rust.map(str::to_owned).collect())
    }

    fn read(&self, name: &str) -> Result<String> {
        match &self.revision {
            Some(revision) => {
                run::output(git(&self.repository).args(["show", &format!("{revision}:{name}")]))
            }
            None => {
                let path = self.repository.join(name);
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
            }
        }
    }
}

fn git(repository: &Path) -> Command {
    let mut git = Command::new("git");
    git.arg("-C")
        .arg(repository)
        .args(["-c", "core.quotePath=false"]);
    git
}

/// Returns the new paths of moved files by their old paths, as git detects them.
fn moves(repository: &Path, options: &Options) -> Result<BTreeMap<String, String>> {
    let mut git = git(repository);
    git.args(["diff", "--name-status", "-M40%", "-l0", &options.base]);
    git.args(&options.to);
    let changes = run::output(&mut git)?;
    let moved = changes.lines().filter_map(|line| {
        let mut cells = line.split('\t');
        let is_move = cells.next()?.starts_with('R');
        let (old, new) = (cells.next()?, cells.next()?);
        is_move.then(|| (old.to_owned(), new.to_owned()))
    });
    Ok(moved.collect())
}

#[derive(Default)]
struct Totals {
    files: usize,
    moved: usize,
    tokens: usize,
    texts: usize,
}

impl Totals {
    fn compare(&mut self, before: &[Token], after: &[Token], any_text: bool) -> Result<()> {
        for (old, new) in before.iter().zip(after) {
            self.tokens += 1;
            let is_same = match (&old.kind, &new.kind) {
                (Kind::Word(_), Kind::Word(name)) => {
                    old.kind == new.kind || old.others.contains(name)
                }
                (Kind::Text(_), Kind::Text(_)) if any_text => {
                    self.texts += usize::from(old.kind != new.kind);
                    true
                }
                _ => old.kind == new.kind,
            };
            ensure!(
                is_same,
                "line {}: {}; line {} before: {}",
                new.line,
                new.kind,
                old.line,
                old.kind
            );
        }
        ensure!(
            before.len() == after.len(),
            "{} tokens; {} before",
            after.len(),
            before.len()
        );
        Ok(())
    }
}

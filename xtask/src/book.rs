// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Makes the documentation: the book of `docs`, and rustdoc of the crates.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::build;
use crate::module;
use crate::paths;
use crate::progress::say;
use crate::run;
use crate::setup::{self, Kernel};

/// The version of mdBook. It is built once, into the cache.
const MDBOOK: &str = "0.4.52";

/// Makes the book, into `target/book`.
///
/// # Errors
///
/// If mdBook cannot be built, or finds an error.
pub fn book() -> Result<()> {
    let repository = paths::repository()?;
    let mdbook = mdbook()?;
    let target = build::target_folder()?.join("book");
    let mut command = Command::new(mdbook);
    command.arg("build").arg(repository.join("docs"));
    command.arg("--dest-dir").arg(&target);
    run::inherit_output(&mut command)?;
    say(format_args!("the book: {}/index.html", target.display()));
    Ok(())
}

/// Makes rustdoc's pages of the crates, into `target/doc`, and of the kernel module, beside it. A warning is an error.
///
/// # Errors
///
/// If rustdoc warns.
pub fn doc() -> Result<()> {
    // Private items are documented, so links to them work.
    const FLAGS: &str = "--deny warnings --allow rustdoc::private_intra_doc_links";

    say("documentation of the crates");
    let mut command = build::cargo()?;
    command.args([
        "doc",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ]);
    run::inherit_output(command.env("RUSTDOCFLAGS", FLAGS))?;
    say("documentation of the module");
    let module = module::document(&setup::ensure(&[Kernel::Stock])?)?;
    say(format_args!(
        "the documentation: {} and {}",
        build::target_folder()?.join("doc").display(),
        module.join("index.html").display()
    ));
    Ok(())
}

fn mdbook() -> Result<PathBuf> {
    let root = paths::cache()?.join(format!("mdbook-{MDBOOK}"));
    let program = root.join("bin/mdbook");
    if !program.is_file() {
        say("building mdBook, once");
        // Cargo puts the program in its place when it is complete.
        let mut install = build::cargo()?;
        install.args(["install", "mdbook", "--locked", "--no-default-features"]);
        install.args(["--version", MDBOOK, "--root"]).arg(&root);
        run::inherit_output(&mut install)?;
    }
    Ok(program)
}

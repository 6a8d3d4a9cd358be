// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! To come.
#[derive(clap::Args)]
pub struct Options {}
pub fn command(_: &Options) -> anyhow::Result<()> {
    Ok(())
}

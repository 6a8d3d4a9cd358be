// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The fuzz target `stream`: see `fuzz/README.md`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz_targets::Target::Stream.run(bytes));

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    fuzz_targets::replay_arguments(fuzz_targets::Target::Stream)
}

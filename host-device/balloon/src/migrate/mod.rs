// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migrations of the guest whose balloon this is.

pub mod hints;

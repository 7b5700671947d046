//! The fixture of the end-to-end tests: the real binary in network namespaces, driven as a person drives it.
//!
//! What it guarantees, as absences:
//! - no wait without an end: each program and each condition has a time limit;
//! - no leftover: a box that a test made is gone when the test is over, also when the test failed, and that is checked;
//! - nothing of others touched: a given cluster is refused where the product, or a namespace of a test's, is there before;
//! - no silent skip: a test, or a part of one, that cannot run here says its name and the reason.

#![forbid(unsafe_code)]

// What a test needs of the machine, and what it must leave as it was
mod machine;
mod requirements;
// Waiting and running
mod program;
mod wait;
// The box, its pods and its processes
mod cluster;
mod kubernetes;
mod load;
mod ordeal;
mod processes;
pub mod secret;
mod shared;
mod view;
// The wire between the nodes, and what tshark says of it
mod streams;
mod wiretap;

pub use cluster::{Cluster, OUTSIDE, Owner, binary};
pub use kubernetes::{Kubernetes, SHOP, SHOP_IS_STRICT, xtask};
pub use load::{Counts, Load, Loaded, Report, Server};
pub use machine::Machine;
pub use ordeal::{ENOUGH, PORT, assert_only_what_was_open_broke, meanwhile, under_load};
pub use processes::{Replaced, is_gone};
pub use program::{Finished, Program, Running};
pub use requirements::{announce_skip, announce_skipped_part, as_ordinary_user, missing, name_of, postgres};
pub use shared::Shared;
pub use streams::{Streams, tls_records};
pub use view::{Family, text};
pub use wait::{PATIENCE, eventually, wait_until};
pub use wiretap::Wiretap;

/// Leaves the test, and says why, when the machine lacks one of the programs; some words stand for more than a program
/// ([`missing`]).
#[macro_export]
macro_rules! needs {
    ($($what:literal),* $(,)?) => {
        fn here() {}
        if let Some(reason) = $crate::missing(&[$($what),*]) {
            $crate::announce_skip($crate::name_of(&here), &reason);
            return;
        }
    };
}

/// Leaves a part of a test, which is a function of its own, and says why, when what the part needs is not here; the part gives
/// what is empty.
#[macro_export]
macro_rules! part_needs {
    ($($what:literal),* $(,)?) => {
        fn here() {}
        if let Some(reason) = $crate::missing(&[$($what),*]) {
            $crate::announce_skipped_part($crate::name_of(&here), &reason);
            return Default::default();
        }
    };
}

/// The path of a program of `tests/e2e/programs`.
#[must_use]
pub fn script(name: &str) -> String {
    format!("{}/programs/{name}", env!("CARGO_MANIFEST_DIR"))
}

//! `cargo +nightly fuzz run manifests`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::check("manifests", bytes));

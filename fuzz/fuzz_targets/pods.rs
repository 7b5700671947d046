//! `cargo +nightly fuzz run pods`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::check("pods", bytes));

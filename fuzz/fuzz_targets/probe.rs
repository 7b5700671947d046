//! `cargo +nightly fuzz run probe`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::check("probe", bytes));

//! `cargo +nightly fuzz run hello`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::check("hello", bytes));

//! `cargo +nightly fuzz run discovery_server`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::check("discovery_server", bytes));

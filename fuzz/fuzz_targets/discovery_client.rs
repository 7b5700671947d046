//! `cargo +nightly fuzz run discovery_client`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::check("discovery_client", bytes));

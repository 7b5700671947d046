//! `cargo +nightly fuzz run csr`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::check("csr", bytes));

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fieldgate::testing::fuzz::session(input));

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    polyprag_core::fuzzing::router(data);
});

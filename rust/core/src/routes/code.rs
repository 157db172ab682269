//! The codec that keeps a code: d numbers as int8, from which the decoder of the store makes the logits.

use crate::routes::codec::{Codec, Keeps};
use crate::routes::scalar::{INT8_LIMIT, decode_int8, encode_int8, int8_error_bound};

#[derive(Debug)]
pub struct Code {
    columns: usize,
}

impl Code {
    pub fn new(columns: usize) -> Self {
        Self { columns }
    }
}

impl Codec for Code {
    fn keeps(&self) -> Keeps {
        Keeps::Code
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn record_bytes(&self) -> usize {
        self.columns
    }

    fn scaled(&self) -> bool {
        true
    }

    fn limit(&self) -> f32 {
        INT8_LIMIT
    }

    fn encode(&self, row: &[f32], scales: &[f32], record: &mut Vec<u8>) {
        encode_int8(row, scales, record);
    }

    fn decode(&self, record: &[u8], scales: &[f32], row: &mut [f32]) {
        decode_int8(record, scales, row);
    }

    fn error_bound(&self, _: f32, scale: f32) -> f32 {
        int8_error_bound(scale)
    }
}

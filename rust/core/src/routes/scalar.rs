//! Codecs that keep each logit by itself: f32, f16 and q8.

use half::f16;

use crate::routes::codec::{Codec, Keeps};

#[derive(Debug)]
pub struct F32 {
    columns: usize,
}

impl F32 {
    pub fn new(columns: usize) -> Self {
        Self { columns }
    }
}

impl Codec for F32 {
    fn keeps(&self) -> Keeps {
        Keeps::Logits
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn record_bytes(&self) -> usize {
        4 * self.columns
    }

    fn scaled(&self) -> bool {
        false
    }

    fn limit(&self) -> f32 {
        f32::MAX
    }

    fn encode(&self, row: &[f32], _: &[f32], record: &mut Vec<u8>) {
        record.extend(row.iter().flat_map(|x| x.to_le_bytes()));
    }

    fn decode(&self, record: &[u8], _: &[f32], row: &mut [f32]) {
        let (words, _) = record.as_chunks::<4>();
        for (x, raw) in row.iter_mut().zip(words) {
            *x = f32::from_le_bytes(*raw);
        }
    }

    fn error_bound(&self, _: f32, _: f32) -> f32 {
        0.0
    }
}

#[derive(Debug)]
pub struct F16 {
    columns: usize,
}

impl F16 {
    pub fn new(columns: usize) -> Self {
        Self { columns }
    }
}

impl Codec for F16 {
    fn keeps(&self) -> Keeps {
        Keeps::Logits
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn record_bytes(&self) -> usize {
        2 * self.columns
    }

    fn scaled(&self) -> bool {
        false
    }

    fn limit(&self) -> f32 {
        f16::MAX.to_f32()
    }

    fn encode(&self, row: &[f32], _: &[f32], record: &mut Vec<u8>) {
        record.extend(row.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()));
    }

    fn decode(&self, record: &[u8], _: &[f32], row: &mut [f32]) {
        let (words, _) = record.as_chunks::<2>();
        for (x, raw) in row.iter_mut().zip(words) {
            *x = f16::from_le_bytes(*raw).to_f32();
        }
    }

    /// Half a unit in the last of 11 bits, or half the smallest subnormal.
    fn error_bound(&self, value: f32, _: f32) -> f32 {
        (value.abs() / 2048.0).max(f32::from_bits(0x3300_0000))
    }
}

/// Int8 in units of the scale of the column, symmetric: 0 is exact.
#[derive(Debug)]
pub struct Q8 {
    columns: usize,
}

impl Q8 {
    pub fn new(columns: usize) -> Self {
        Self { columns }
    }
}

impl Codec for Q8 {
    fn keeps(&self) -> Keeps {
        Keeps::Logits
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

/// Half of the largest f32, so that 127 scales never overflow.
pub(super) const INT8_LIMIT: f32 = f32::MAX / 2.0;

pub(super) fn encode_int8(row: &[f32], scales: &[f32], record: &mut Vec<u8>) {
    record.extend(row.iter().zip(scales).map(|(x, scale)| {
        // 0 / 0 is NaN, which the cast makes 0.
        let units = (f64::from(*x) / f64::from(*scale))
            .round()
            .clamp(-127.0, 127.0);
        (units as i8).cast_unsigned()
    }));
}

pub(super) fn decode_int8(record: &[u8], scales: &[f32], row: &mut [f32]) {
    for ((x, raw), scale) in row.iter_mut().zip(record).zip(scales) {
        *x = f32::from(raw.cast_signed()) * scale;
    }
}

/// Half a unit; the small addition is the rounding of 127 * scale to f32.
pub(super) fn int8_error_bound(scale: f32) -> f32 {
    scale * 0.500_02
}

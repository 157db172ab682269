//! The decoder that the corpus shares: z = V c + b.

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::tensors::{Dtype, Tensor, TensorFile, TensorView};

const V: &str = "V";
const B: &str = "b";

/// V of shape [G * K, d] and b of shape [G * K].
#[derive(Debug)]
pub struct Decoder {
    file: TensorFile,
    // As numbers once, not at every call; a decoder is small and constant.
    v: Vec<f32>,
    b: Vec<f32>,
    columns: usize,
}

fn shapes(logits: usize, columns: usize) -> [(String, Vec<usize>); 2] {
    [(V.into(), vec![logits, columns]), (B.into(), vec![logits])]
}

impl Decoder {
    pub fn open(map: Mapped, logits: usize, columns: usize) -> Result<Self> {
        let file = TensorFile::open(map, &shapes(logits, columns), &[Dtype::F32])?;
        let numbers = |name: &str| -> Vec<f32> {
            let bytes = file.get(name).map(|t| t.bytes()).unwrap_or_default();
            let (words, _) = bytes.as_chunks::<4>();
            words.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
        };
        let (v, b) = (numbers(V), numbers(B));
        Ok(Self {
            file,
            v,
            b,
            columns,
        })
    }

    /// Checks and writes what a creator gives, little endian.
    pub fn write(
        dir: &Directory,
        name: &str,
        decoder: &DecoderInput<'_>,
        logits: usize,
        columns: usize,
    ) -> Result<Digest> {
        let tensors = [
            Tensor {
                name: V.into(),
                dtype: Dtype::F32,
                shape: decoder.v_shape.to_vec(),
                data: decoder.v,
            },
            Tensor {
                name: B.into(),
                dtype: Dtype::F32,
                shape: decoder.b_shape.to_vec(),
                data: decoder.b,
            },
        ];
        TensorFile::write(
            dir,
            name,
            "decoder",
            &tensors,
            &shapes(logits, columns),
            &[Dtype::F32],
        )
    }

    pub fn views(&self) -> Option<(TensorView, TensorView)> {
        Some((self.file.get(V)?.clone(), self.file.get(B)?.clone()))
    }

    /// The logits of codes, row after row. Sums are taken in f64: a decoder may have thousands of columns.
    pub fn decode(&self, codes: &[f32], logits: &mut [f32]) -> Result<()> {
        let n = codes.len() / self.columns.max(1);
        if codes.len() != n * self.columns || n.checked_mul(self.b.len()) != Some(logits.len()) {
            return Err(Error::invalid(format!(
                "decoder: expected codes of {} and room for {} logits each, got {} and {}",
                self.columns,
                self.b.len(),
                codes.len(),
                logits.len()
            )));
        }
        let rows = logits.chunks_exact_mut(self.b.len().max(1));
        for (code, logits) in codes.chunks_exact(self.columns.max(1)).zip(rows) {
            let rows = self.v.chunks_exact(self.columns.max(1));
            for ((z, row), b) in logits.iter_mut().zip(rows).zip(&self.b) {
                *z = (dot(row, code) + f64::from(*b)) as f32;
            }
        }
        Ok(())
    }

    pub fn verify(&self) -> Result<()> {
        self.file.verify()
    }
}

/// Four sums side by side, which lets the processor work on several products at once.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let (a4, a1) = a.as_chunks::<4>();
    let (b4, b1) = b.as_chunks::<4>();
    let mut sums = [0.0f64; 4];
    for (x, y) in a4.iter().zip(b4) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += f64::from(*x) * f64::from(*y);
        }
    }
    let rest: f64 = a1
        .iter()
        .zip(b1)
        .map(|(x, y)| f64::from(*x) * f64::from(*y))
        .sum();
    sums.iter().sum::<f64>() + rest
}

/// V and b as a creator gives them: f32, little endian, C order.
#[derive(Debug, Clone, Copy)]
pub struct DecoderInput<'t> {
    pub v: &'t [u8],
    pub v_shape: &'t [usize],
    pub b: &'t [u8],
    pub b_shape: &'t [usize],
}

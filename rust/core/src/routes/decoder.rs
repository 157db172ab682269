//! The decoder that the corpus shares: z = V c + b.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::routes::matrix::Matrix;
use crate::tensors::{self, Header, Slot, Tensor, TensorFile, TensorView};
use crate::watch::Progress;

const V: &str = "V";
const B: &str = "b";

/// V of shape [G * K, d] and b of shape [G * K].
#[derive(Debug)]
pub struct Decoder {
    file: TensorFile,
    // As numbers once, not at every call; a decoder is small and constant.
    matrix: Matrix,
}

fn slots(logits: usize, columns: usize) -> [Slot; 2] {
    let slot = |name: &str, shape| Slot {
        name: name.into(),
        dtype: Dtype::F32,
        shape,
    };
    [slot(V, vec![logits, columns]), slot(B, vec![logits])]
}

impl Decoder {
    pub fn open(map: Mapped, logits: usize, columns: usize) -> Result<Self> {
        let file = Header::read(map, 2)?.open(&slots(logits, columns))?;
        let numbers = |name: &str| -> Vec<f32> {
            let bytes = file.get(name).map(|t| t.bytes()).unwrap_or_default();
            let mut numbers = Vec::new();
            Dtype::F32.decode(bytes, &mut numbers);
            numbers
        };
        let matrix = Matrix::new(&numbers(V), &numbers(B), columns);
        Ok(Self { file, matrix })
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
        tensors::write_given(dir, name, "decoder", &tensors, &slots(logits, columns))
    }

    pub fn views(&self) -> Option<(TensorView, TensorView)> {
        Some((self.file.get(V)?.clone(), self.file.get(B)?.clone()))
    }

    /// The logits of codes, row after row.
    pub fn decode(&self, codes: &[f32], logits: &mut [f32]) -> Result<()> {
        let (columns, width) = (self.matrix.columns(), self.matrix.logits());
        let n = codes.len() / columns;
        if !codes.len().is_multiple_of(columns) || n.checked_mul(width) != Some(logits.len()) {
            return Err(Error::invalid(format!(
                "decoder: expected codes of {columns} and room for {width} logits each, got {} and {}",
                codes.len(),
                logits.len()
            )));
        }
        self.matrix.multiply(codes, logits);
        Ok(())
    }

    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.file.verify(progress)
    }
}

/// V and b as a creator gives them: f32, little endian, C order.
#[derive(Debug, Clone, Copy)]
pub struct DecoderInput<'t> {
    pub v: &'t [u8],
    pub v_shape: &'t [usize],
    pub b: &'t [u8],
    pub b_shape: &'t [usize],
}

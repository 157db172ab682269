//! The latent experts: for each module A of [K, r, in] and B of [out, K, r].

use crate::error::Result;
use crate::files::{Digest, Directory, Mapped};
use crate::spec::StoreSpec;
use crate::tensors::{Dtype, Tensor, TensorFile, TensorView};

const ALLOWED: [Dtype; 2] = [Dtype::F32, Dtype::F16];

#[derive(Debug)]
pub struct Experts(TensorFile);

fn shapes(spec: &StoreSpec) -> Vec<(String, Vec<usize>)> {
    let (k, r) = (spec.experts as usize, spec.rank as usize);
    spec.modules
        .iter()
        .flat_map(|m| {
            [
                (format!("{}.A", m.name), vec![k, r, m.in_features as usize]),
                (format!("{}.B", m.name), vec![m.out_features as usize, k, r]),
            ]
        })
        .collect()
}

impl Experts {
    pub fn open(map: Mapped, spec: &StoreSpec) -> Result<Self> {
        TensorFile::open(map, &shapes(spec), &ALLOWED).map(Self)
    }

    pub fn write(
        dir: &Directory,
        name: &str,
        experts: &[Tensor<'_>],
        spec: &StoreSpec,
    ) -> Result<Digest> {
        TensorFile::write(dir, name, "experts", experts, &shapes(spec), &ALLOWED)
    }

    pub fn views(&self) -> &[TensorView] {
        self.0.views()
    }

    /// Bytes of one number.
    pub fn width(&self) -> u64 {
        self.0.dtype().map_or(0, |d| d.width() as u64)
    }

    pub fn verify(&self) -> Result<()> {
        self.0.verify()
    }
}

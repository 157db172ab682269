//! The latent experts: for each module A of [K, r, in] and B of [out, K, r], all in one dtype.
//!
//! Expert k has r rows in either: of A, the numbers [k, j, ..]; of B, the numbers [.., k, j]. As int8 each row
//! has a scale, and a number is its integer times the scale of its row.

mod source;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::spec::{Module, StoreSpec};
use crate::tensors::{self, Header, Slot, Tensor, TensorView};
use crate::watch::Progress;

use source::{MAX_SCALE, Rows, Source};

const WHAT: &str = "experts";

/// A tensor of the spec, whatever its dtype.
#[derive(Debug, Clone)]
struct Place {
    name: String,
    shape: Vec<usize>,
    rows: Rows,
}

fn places(spec: &StoreSpec) -> Vec<Place> {
    let (experts, rank) = (spec.experts as usize, spec.rank as usize);
    let place = |m: &Module, end: &str, shape: [usize; 3], run| Place {
        name: format!("{}.{end}", m.name),
        shape: shape.to_vec(),
        rows: Rows { experts, rank, run },
    };
    let of_module = |m: &Module| {
        let (inner, outer) = (m.in_features as usize, m.out_features as usize);
        [
            place(m, "A", [experts, rank, inner], inner),
            place(m, "B", [outer, experts, rank], 1),
        ]
    };
    spec.modules.iter().flat_map(of_module).collect()
}

fn scale_name(tensor: &str) -> String {
    format!("{tensor}.scale")
}

/// What a file holds, in the order in which it is written: scales first, since their numbers are wider.
fn slots<'p>(dtype: Dtype, places: impl Iterator<Item = &'p Place> + Clone) -> Vec<Slot> {
    let scales = places.clone().map(|place| Slot {
        name: scale_name(&place.name),
        dtype: Dtype::F32,
        shape: vec![place.rows.experts, place.rows.rank],
    });
    let own = places.map(|place| Slot {
        name: place.name.clone(),
        dtype,
        shape: place.shape.clone(),
    });
    match dtype {
        Dtype::Int8 => scales.chain(own).collect(),
        _ => own.collect(),
    }
}

/// One A or B in a mapped file, which it keeps alive.
#[derive(Debug, Clone)]
pub struct ExpertTensor {
    /// As it is in the file; of int8 the integers.
    pub raw: TensorView,
    /// [K, r], for int8 only.
    pub scale: Option<TensorView>,
    place: Place,
}

impl ExpertTensor {
    /// The numbers, in C order.
    pub fn to_f32(&self) -> Vec<f32> {
        let source = self.source();
        let mut numbers = Vec::with_capacity(self.raw.shape.iter().product());
        for (start, bytes) in source.chunks() {
            source.decode(start, bytes, &mut numbers);
        }
        numbers
    }

    fn source(&self) -> Source<'_> {
        let mut scales = Vec::new();
        if let Some(view) = &self.scale {
            Dtype::F32.decode(view.bytes(), &mut scales);
        }
        Source {
            place: &self.place,
            dtype: self.raw.dtype,
            data: self.raw.bytes(),
            scales,
        }
    }
}

#[derive(Debug)]
pub struct Experts {
    dtype: Dtype,
    tensors: Vec<ExpertTensor>,
}

impl Experts {
    pub fn open(map: Mapped, spec: &StoreSpec) -> Result<Self> {
        let places = places(spec);
        let header = Header::read(map, 2 * places.len())?;
        let dtype = match places.first() {
            Some(place) => header.dtype(&place.name)?,
            None => return Err(Error::invalid("experts: the spec has no module")),
        };
        let file = header.open(&slots(dtype, places.iter()))?;
        let view = |name: &str| {
            let missing = || Error::invalid(format!("experts: no tensor {name:?}"));
            file.get(name).cloned().ok_or_else(missing)
        };
        let tensors = places
            .into_iter()
            .map(|place| {
                let raw = view(&place.name)?;
                let scale = match dtype {
                    Dtype::Int8 => Some(checked_scale(view(&scale_name(&place.name))?)?),
                    _ => None,
                };
                Ok(ExpertTensor { raw, scale, place })
            })
            .collect::<Result<_>>()?;
        Ok(Self { dtype, tensors })
    }

    /// Checks what a creator gives, all float32 or all float16, and writes it as `dtype`, or as it is.
    pub fn write(
        dir: &Directory,
        name: &str,
        given: &[Tensor<'_>],
        spec: &StoreSpec,
        dtype: Option<Dtype>,
    ) -> Result<Digest> {
        let places = places(spec);
        let own = given.first().map_or(Dtype::F32, |t| t.dtype);
        if !matches!(own, Dtype::F32 | Dtype::F16) {
            return Err(Error::invalid(format!(
                "experts: expected all tensors as float32, or all as float16, got {own}"
            )));
        }
        let given = tensors::check_given(WHAT, given, &slots(own, places.iter()))?;
        let sources: Vec<_> = places
            .iter()
            .zip(given)
            .map(|(place, tensor)| Source {
                place,
                dtype: own,
                data: tensor.data,
                scales: Vec::new(),
            })
            .collect();
        let dtype = dtype.unwrap_or(own);
        write_sources(dir, name, &sources, dtype, &Progress::unseen())
    }

    /// Writes the same experts as `dtype` into another file. What [`Dtype::is_lossy`] took away stays away. Counts
    /// their bytes as often as [`Experts::times`] says.
    pub fn rewrite(
        &self,
        dir: &Directory,
        name: &str,
        dtype: Dtype,
        progress: &Progress,
    ) -> Result<Digest> {
        self.verify(progress)?;
        let sources: Vec<_> = self.tensors.iter().map(ExpertTensor::source).collect();
        write_sources(dir, name, &sources, dtype, progress)
    }

    /// How often they are gone through to be written as `dtype`: looked through, fitted where scales are needed, and
    /// written; or copied.
    pub fn times(&self, dtype: Dtype) -> u64 {
        match dtype {
            _ if dtype == self.dtype => 1,
            Dtype::Int8 => 3,
            _ => 2,
        }
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// In the order of the modules, A before B.
    pub fn tensors(&self) -> &[ExpertTensor] {
        &self.tensors
    }

    /// Bytes of one LoRA of the same rank and modules in the same dtype.
    pub fn lora_bytes(&self, spec: &StoreSpec) -> u64 {
        let numbers = spec.lora_bytes(self.dtype.width() as u64);
        let scales = match self.dtype {
            Dtype::Int8 => 2 * 4 * u64::from(spec.rank) * spec.modules.len() as u64,
            _ => 0,
        };
        numbers.saturating_add(scales)
    }

    pub fn verify(&self, progress: &Progress) -> Result<()> {
        for tensor in &self.tensors {
            tensor.raw.verify(progress)?;
            tensor.scale.iter().try_for_each(|s| s.verify(progress))?;
        }
        Ok(())
    }
}

/// A scale that is none would make every number of its row NaN or infinite.
fn checked_scale(view: TensorView) -> Result<TensorView> {
    let (words, _) = view.bytes().as_chunks::<4>();
    let mut scales = words.iter().map(|raw| f32::from_le_bytes(*raw));
    match scales.find(|s| !(0.0..=MAX_SCALE).contains(s)) {
        None => Ok(view),
        Some(s) => Err(view.corrupt(&format!("from 0 to {MAX_SCALE:e}"), &s.to_string())),
    }
}

fn write_sources(
    dir: &Directory,
    name: &str,
    sources: &[Source<'_>],
    dtype: Dtype,
    progress: &Progress,
) -> Result<Digest> {
    let scales = sources.iter().map(|source| match dtype {
        Dtype::Int8 => source.fitted_scales(progress),
        _ => Ok(Vec::new()),
    });
    let scales: Vec<Vec<f32>> = scales.collect::<Result<_>>()?;
    let slots = slots(dtype, sources.iter().map(|s| s.place));
    tensors::write(dir, name, WHAT, &slots, |body| {
        for scales in &scales {
            let bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            body.write(&bytes)?;
        }
        let mut pairs = sources.iter().zip(&scales);
        pairs.try_for_each(|(source, scales)| source.write_as(dtype, scales, body, progress))
    })
}

#[cfg(test)]
mod tests;

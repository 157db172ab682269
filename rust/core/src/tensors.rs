//! Named tensors in a safetensors file: written from what a creator gives, read as views into the map.

use std::collections::HashMap;
use std::ops::Range;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView as RawView;

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn width(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 => 2,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
        }
    }

    fn raw(self) -> safetensors::Dtype {
        match self {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
        }
    }

    fn from_raw(raw: safetensors::Dtype) -> Option<Self> {
        match raw {
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            _ => None,
        }
    }
}

/// A tensor that a creator gives: little endian, C order.
#[derive(Debug, Clone)]
pub struct Tensor<'t> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: &'t [u8],
}

/// A tensor in a mapped file, which it keeps alive.
#[derive(Debug, Clone)]
pub struct TensorView {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    map: Mapped,
    range: Range<usize>,
}

impl TensorView {
    /// Little endian, C order, aligned to the width of its dtype.
    pub fn bytes(&self) -> &[u8] {
        self.map.get(self.range.clone()).unwrap_or_default()
    }
}

/// What a file must hold: these tensors, no others, of these shapes, all of one dtype.
pub type Shapes = [(String, Vec<usize>)];

#[derive(Debug)]
pub struct TensorFile {
    // In order of the expected list.
    tensors: Vec<TensorView>,
    places: HashMap<String, usize>,
}

impl TensorFile {
    pub fn open(map: Mapped, expected: &Shapes, allowed: &[Dtype]) -> Result<Self> {
        let path = map.path();
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::corrupt(path, "header", "a safetensors header", e))?;
        let infos = metadata.tensors();
        if infos.len() != expected.len() {
            return Err(Error::corrupt(
                path,
                "header",
                format!("{} tensors", expected.len()),
                infos.len(),
            ));
        }
        let mut tensors: Vec<TensorView> = Vec::with_capacity(expected.len());
        let mut places = HashMap::with_capacity(expected.len());
        for (name, shape) in expected {
            let info = infos.get(name).ok_or_else(|| {
                Error::corrupt(path, "header", format!("a tensor {name:?}"), "none")
            })?;
            let dtype = Dtype::from_raw(info.dtype)
                .filter(|d| allowed.contains(d) && tensors.first().is_none_or(|t| t.dtype == *d))
                .ok_or_else(|| {
                    let names: Vec<_> = allowed.iter().map(|d| d.name()).collect();
                    let expected = format!("{name:?} as the others, of {}", names.join(" or "));
                    Error::corrupt(path, "dtype", expected, format!("{:?}", info.dtype))
                })?;
            if info.shape != *shape {
                let (shape, found) = (
                    format!("{name:?} of {shape:?}"),
                    format!("{:?}", info.shape),
                );
                return Err(Error::corrupt(path, "shape", shape, found));
            }
            // `read_metadata` has compared the offsets with the length of the file; `get` below does again.
            let base = header.saturating_add(8);
            let range =
                base.saturating_add(info.data_offsets.0)..base.saturating_add(info.data_offsets.1);
            let bytes = shape
                .iter()
                .try_fold(dtype.width(), |n, x| n.checked_mul(*x));
            if map.get(range.clone()).map(<[u8]>::len) != bytes {
                return Err(Error::corrupt(
                    path,
                    "offsets",
                    format!("all of {name:?}"),
                    format!("{range:?}"),
                ));
            }
            if range.start % dtype.width() != 0 {
                return Err(Error::corrupt(
                    path,
                    "offsets",
                    format!("{name:?} aligned"),
                    range.start,
                ));
            }
            places.insert(name.clone(), tensors.len());
            tensors.push(TensorView {
                name: name.clone(),
                dtype,
                shape: shape.clone(),
                map: map.clone(),
                range,
            });
        }
        Ok(Self { tensors, places })
    }

    pub fn write(
        dir: &Directory,
        name: &str,
        what: &str,
        tensors: &[Tensor<'_>],
        expected: &Shapes,
        allowed: &[Dtype],
    ) -> Result<Digest> {
        let given = check_given(what, tensors, expected, allowed)?;
        let mut views = Vec::with_capacity(given.len());
        for tensor in given {
            let view = RawView::new(tensor.dtype.raw(), tensor.shape.clone(), tensor.data)
                .map_err(|e| Error::invalid(format!("{what} {:?}: {e}", tensor.name)))?;
            views.push((tensor.name.clone(), view));
        }
        let bytes = safetensors::serialize(views, None)
            .map_err(|e| Error::invalid(format!("{what}: {e}")))?;
        dir.write_part(name, &bytes)
    }

    pub fn views(&self) -> &[TensorView] {
        &self.tensors
    }

    pub fn get(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(*self.places.get(name)?)
    }

    pub fn dtype(&self) -> Option<Dtype> {
        self.tensors.first().map(|t| t.dtype)
    }

    /// Numbers that are not finite would poison every answer.
    pub fn verify(&self) -> Result<()> {
        for t in &self.tensors {
            if !all_finite(t.dtype, t.bytes()) {
                return Err(Error::corrupt(
                    t.map.path(),
                    "tensor",
                    format!("{:?} finite", t.name),
                    "NaN or infinity",
                ));
            }
        }
        Ok(())
    }
}

fn check_given<'g, 't>(
    what: &str,
    tensors: &'g [Tensor<'t>],
    expected: &Shapes,
    allowed: &[Dtype],
) -> Result<Vec<&'g Tensor<'t>>> {
    let mut by_name: HashMap<&str, &Tensor<'t>> =
        tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    if by_name.len() != tensors.len() {
        return Err(Error::invalid(format!("{what}: a tensor is given twice")));
    }
    let mut given: Vec<&Tensor<'t>> = Vec::with_capacity(expected.len());
    for (name, shape) in expected {
        let tensor = by_name.remove(name.as_str()).ok_or_else(|| {
            Error::invalid(format!("{what}: {name:?} of shape {shape:?} is missing"))
        })?;
        let dtype = tensor.dtype;
        if !allowed.contains(&dtype) || given.first().is_some_and(|t| t.dtype != dtype) {
            let names: Vec<_> = allowed.iter().map(|d| d.name()).collect();
            return Err(Error::invalid(format!(
                "{what} {name:?}: expected all tensors as {}, got {}",
                names.join(", or all as "),
                dtype.name()
            )));
        }
        if tensor.shape != *shape {
            return Err(Error::invalid(format!(
                "{what} {name:?}: expected shape {shape:?}, got {:?}",
                tensor.shape
            )));
        }
        let bytes = shape
            .iter()
            .try_fold(dtype.width(), |n, x| n.checked_mul(*x));
        if bytes != Some(tensor.data.len()) {
            return Err(Error::invalid(format!(
                "{what} {name:?}: expected {bytes:?} bytes, got {}",
                tensor.data.len()
            )));
        }
        if !all_finite(dtype, tensor.data) {
            return Err(Error::invalid(format!(
                "{what} {name:?}: holds NaN or infinity"
            )));
        }
        given.push(tensor);
    }
    match by_name.keys().min() {
        Some(extra) => Err(Error::invalid(format!(
            "{what}: {extra:?} belongs to no module of the spec"
        ))),
        None => Ok(given),
    }
}

fn all_finite(dtype: Dtype, data: &[u8]) -> bool {
    match dtype {
        Dtype::F32 => {
            let (words, _) = data.as_chunks::<4>();
            words.iter().all(|raw| f32::from_le_bytes(*raw).is_finite())
        }
        Dtype::F16 => {
            let (words, _) = data.as_chunks::<2>();
            words
                .iter()
                .all(|raw| half::f16::from_le_bytes(*raw).is_finite())
        }
    }
}

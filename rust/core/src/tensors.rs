//! Named tensors in a safetensors file: checked as a creator gives them, written one after the other, read as
//! views into the map.

use std::collections::HashMap;
use std::ops::Range;

use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped, PartWriter};
use crate::frame::u64_at;
use crate::watch::Progress;

/// Small tensors are gathered, so that a file is few writes.
const BUFFER: usize = 1 << 20;
/// Bytes that are looked through at a time: whole numbers of every dtype.
const PIECE: usize = 1 << 20;
/// No reader of safetensors takes a longer header.
const MAX_HEADER: usize = 100_000_000;

/// Bytes of a header beside its tensors, and for each of them: a long name, escaped, and its numbers.
const HEADER: u64 = 1 << 16;
const HEADER_OF_TENSOR: u64 = 1 << 12;

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

    /// The error for numbers that are not what they should be.
    pub(crate) fn corrupt(&self, expected: &str, found: &str) -> Error {
        let expected = format!("{:?} {expected}", self.name);
        Error::corrupt(self.map.path(), "tensor", expected, found)
    }

    /// Looks for numbers that no writer writes; counts bytes.
    pub(crate) fn verify(&self, progress: &Progress) -> Result<()> {
        let expected = match self.dtype {
            Dtype::Int8 => "from -127 to 127",
            _ => "finite",
        };
        for piece in self.bytes().chunks(PIECE) {
            if let Some(found) = self.dtype.fault(piece) {
                return Err(self.corrupt(expected, found));
            }
            progress.add(piece.len() as u64)?;
        }
        Ok(())
    }
}

/// What a file must hold under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Slot {
    fn bytes(&self) -> Option<usize> {
        self.shape
            .iter()
            .try_fold(self.dtype.width(), |n, x| n.checked_mul(*x))
    }
}

/// The header of a safetensors file, whose offsets lie within it and leave nothing out.
#[derive(Debug)]
pub struct Header {
    map: Mapped,
    metadata: Metadata,
    /// Where the tensors begin.
    base: usize,
}

impl Header {
    /// Of a file of at most so many tensors: a header takes much more memory than its text.
    pub fn read(map: Mapped, tensors: usize) -> Result<Self> {
        let limit = HEADER_OF_TENSOR
            .saturating_mul(tensors as u64)
            .saturating_add(HEADER);
        let length = u64_at(&map, 0).unwrap_or_default();
        if length > limit {
            let expected = format!("at most {limit} bytes for {tensors} tensors");
            return Err(Error::corrupt(map.path(), "header", expected, length));
        }
        let (length, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::corrupt(map.path(), "header", "a safetensors header", e))?;
        Ok(Self {
            base: length.saturating_add(8),
            map,
            metadata,
        })
    }

    /// What it says of the tensor `name`, which must be there.
    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || {
            Error::corrupt(
                self.map.path(),
                "header",
                format!("a tensor {name:?}"),
                "none",
            )
        };
        self.metadata.info(name).ok_or_else(missing)
    }

    /// What it says of all its tensors, as if they were of `dtype`.
    pub fn slots(&self, dtype: Dtype) -> Vec<Slot> {
        let infos = self.metadata.tensors();
        let slots = infos.into_iter().map(|(name, info)| Slot {
            name,
            dtype,
            shape: info.shape.clone(),
        });
        slots.collect()
    }

    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        let raw = self.info(name)?.dtype;
        Dtype::from_raw(raw).ok_or_else(|| {
            let known = Dtype::ALL.map(Dtype::name).join(" or ");
            let expected = format!("{name:?} as {known}");
            Error::corrupt(self.map.path(), "dtype", expected, format!("{raw:?}"))
        })
    }

    /// The tensors of the file, which must be `slots` and no others.
    pub fn open(self, slots: &[Slot]) -> Result<TensorFile> {
        let found = self.metadata.offset_keys().len();
        if found != slots.len() {
            let expected = format!("{} tensors", slots.len());
            return Err(Error::corrupt(self.map.path(), "header", expected, found));
        }
        let tensors: Vec<TensorView> = slots
            .iter()
            .map(|slot| self.view(slot))
            .collect::<Result<_>>()?;
        let places = tensors.iter().enumerate();
        Ok(TensorFile {
            places: places.map(|(i, t)| (t.name.clone(), i)).collect(),
            tensors,
        })
    }

    fn view(&self, slot: &Slot) -> Result<TensorView> {
        let Slot { name, dtype, shape } = slot;
        let fail = |what: &str, expected: String, found: String| {
            Error::corrupt(self.map.path(), what, expected, found)
        };
        let info = self.info(name)?;
        if info.dtype != dtype.raw() {
            let found = format!("{:?}", info.dtype);
            return Err(fail("dtype", format!("{name:?} as {dtype}"), found));
        }
        if info.shape != *shape {
            let found = format!("{:?}", info.shape);
            return Err(fail("shape", format!("{name:?} of {shape:?}"), found));
        }
        // The offsets were compared with the length of the file; `get` does so again.
        let (start, end) = info.data_offsets;
        let range = self.base.saturating_add(start)..self.base.saturating_add(end);
        if self.map.get(range.clone()).map(<[u8]>::len) != slot.bytes() {
            let found = format!("{range:?}");
            return Err(fail("offsets", format!("all of {name:?}"), found));
        }
        if !range.start.is_multiple_of(dtype.width()) {
            let found = range.start.to_string();
            return Err(fail("offsets", format!("{name:?} aligned"), found));
        }
        Ok(TensorView {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            map: self.map.clone(),
            range,
        })
    }
}

#[derive(Debug)]
pub struct TensorFile {
    tensors: Vec<TensorView>,
    places: HashMap<String, usize>,
}

impl TensorFile {
    pub fn get(&self, name: &str) -> Option<&TensorView> {
        self.tensors.get(*self.places.get(name)?)
    }

    /// In the order of the slots with which the file was opened.
    pub fn tensors(&self) -> &[TensorView] {
        &self.tensors
    }

    /// Looks for numbers that no writer writes; counts bytes.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.tensors.iter().try_for_each(|t| t.verify(progress))
    }
}

/// Writes what a creator gives, in the order of `slots`.
pub fn write_given(
    dir: &Directory,
    name: &str,
    what: &str,
    tensors: &[Tensor<'_>],
    slots: &[Slot],
) -> Result<Digest> {
    let given = check_given(what, tensors, slots)?;
    write(dir, name, what, slots, |body| {
        given.iter().try_for_each(|tensor| body.write(tensor.data))
    })
}

/// Writes a header for `slots`, and then what `fill` writes: the bytes of each of them, in the same order.
/// Wider numbers must come first, so that all are aligned.
pub fn write(
    dir: &Directory,
    name: &str,
    what: &str,
    slots: &[Slot],
    fill: impl FnOnce(&mut Body) -> Result<()>,
) -> Result<Digest> {
    let header = header(what, slots)?;
    let mut body = Body {
        part: dir.create_part(name)?,
        buffer: header,
    };
    let written = fill(&mut body).and_then(|()| body.finish());
    if written.is_err() {
        // Nobody will refer to it.
        let _ = dir.remove(name);
    }
    written
}

fn header(what: &str, slots: &[Slot]) -> Result<Vec<u8>> {
    let mut infos = Vec::with_capacity(slots.len());
    let mut end = 0usize;
    for slot in slots {
        let start = end;
        end = slot
            .bytes()
            .and_then(|n| start.checked_add(n))
            .ok_or_else(|| Error::invalid(format!("{what} {:?}: too large", slot.name)))?;
        let info = TensorInfo {
            dtype: slot.dtype.raw(),
            shape: slot.shape.clone(),
            data_offsets: (start, end),
        };
        infos.push((slot.name.clone(), info));
    }
    let fail = |e: &dyn std::fmt::Display| Error::invalid(format!("{what}: {e}"));
    let metadata = Metadata::new(None, infos).map_err(|e| fail(&e))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| fail(&e))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() > MAX_HEADER {
        return Err(fail(&"the names of the modules are too long in all"));
    }
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// The tensors of a file in the making.
#[derive(Debug)]
pub struct Body {
    part: PartWriter,
    buffer: Vec<u8>,
}

impl Body {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.buffer.len().saturating_add(bytes.len()) > BUFFER {
            self.flush()?;
        }
        if bytes.len() >= BUFFER {
            return self.part.write(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.part.write(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Digest> {
        self.flush()?;
        self.part.finish()
    }
}

/// What a creator gives, in the order of `slots`: all of them, no others, and only sound numbers.
pub fn check_given<'g, 't>(
    what: &str,
    tensors: &'g [Tensor<'t>],
    slots: &[Slot],
) -> Result<Vec<&'g Tensor<'t>>> {
    let mut by_name: HashMap<&str, &Tensor<'t>> =
        tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    if by_name.len() != tensors.len() {
        return Err(Error::invalid(format!("{what}: a tensor is given twice")));
    }
    let mut given: Vec<&Tensor<'t>> = Vec::with_capacity(slots.len());
    for slot in slots {
        let Slot { name, dtype, shape } = slot;
        let fail = |expected: String| Error::invalid(format!("{what} {name:?}: {expected}"));
        let tensor = by_name.remove(name.as_str()).ok_or_else(|| {
            Error::invalid(format!("{what}: {name:?} of shape {shape:?} is missing"))
        })?;
        if tensor.dtype != *dtype {
            let found = tensor.dtype;
            return Err(fail(format!(
                "expected all tensors as {dtype}, got {found}"
            )));
        }
        if tensor.shape != *shape {
            let found = &tensor.shape;
            return Err(fail(format!("expected shape {shape:?}, got {found:?}")));
        }
        let found = tensor.data.len();
        if slot.bytes() != Some(found) {
            let expected = slot.bytes().unwrap_or(usize::MAX);
            return Err(fail(format!("expected {expected} bytes, got {found}")));
        }
        if let Some(fault) = dtype.fault(tensor.data) {
            return Err(fail(format!("holds {fault}")));
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

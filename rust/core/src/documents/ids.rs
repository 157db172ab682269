//! The ids of a range of docnos: docno to id by position, id to docno by binary search.
//!
//! Body, for u64: the ids; for strings: count + 1 offsets, then the bytes. Then, unless the ids ascend
//! with the docnos, the positions in order of (id, position).

use std::cmp::Ordering;

use crate::documents::DocumentId;
use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind, u32_at, u64_at};
use crate::spec::IdType;

#[derive(Debug)]
pub struct IdSegment {
    frame: Frame,
    first: u64,
    count: u64,
    layout: Layout,
}

#[derive(Debug, Clone, Copy)]
struct Layout {
    id_type: IdType,
    /// Bytes of an offset into the blob; 0 for u64.
    offset_bytes: u64,
    blob: u64,
    /// 0 if the ids ascend.
    order_bytes: u64,
    order: u64,
    body: u64,
}

impl Layout {
    fn of(id_type: IdType, count: u64, blob_length: u64, ascending: bool) -> Option<Self> {
        let bytes = |n: u64| if n <= u64::from(u32::MAX) { 4 } else { 8 };
        let (offset_bytes, blob) = match id_type {
            IdType::U64 => (0, count.checked_mul(8)?),
            IdType::String => {
                let bytes = bytes(blob_length);
                (bytes, count.checked_add(1)?.checked_mul(bytes)?)
            }
        };
        let order = blob.checked_add(blob_length)?;
        let order_bytes = if ascending { 0 } else { bytes(count) };
        let body = order.checked_add(count.checked_mul(order_bytes)?)?;
        Some(Self {
            id_type,
            offset_bytes,
            blob,
            order_bytes,
            order,
            body,
        })
    }
}

/// An id where it lies. Strings are compared as bytes.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum IdRef<'s> {
    U64(u64),
    Bytes(&'s [u8]),
}

impl<'s> From<&'s DocumentId> for IdRef<'s> {
    fn from(id: &'s DocumentId) -> Self {
        match id {
            DocumentId::U64(n) => IdRef::U64(*n),
            DocumentId::String(s) => IdRef::Bytes(s.as_bytes()),
        }
    }
}

impl IdSegment {
    pub fn open(map: Mapped, id_type: IdType) -> Result<Self> {
        let frame = Frame::open(map, Kind::Ids)?;
        let mut fields = frame.fields();
        let (first, count, strings) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (blob_length, ascending) = (fields.u64()?, fields.u64()?);
        let expected = match id_type {
            IdType::U64 => 0,
            IdType::String => 1,
        };
        if strings != expected || ascending > 1 || (strings == 0 && blob_length > 0) {
            let found = format!("type {strings}, {blob_length} bytes, order {ascending}");
            return Err(frame.corrupt("header", format!("ids of type {expected}"), found));
        }
        if first.checked_add(count).is_none() {
            return Err(frame.corrupt(
                "docno range",
                "an end within 64 bits",
                format!("{first}+{count}"),
            ));
        }
        let layout = Layout::of(id_type, count, blob_length, ascending == 1)
            .filter(|l| l.body == frame.body().len() as u64)
            .ok_or_else(|| {
                let found = format!("{} bytes", frame.body().len());
                frame.corrupt("body", format!("{count} ids in {blob_length} bytes"), found)
            })?;
        Ok(Self {
            frame,
            first,
            count,
            layout,
        })
    }

    pub fn first(&self) -> u64 {
        self.first
    }

    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    fn outside(&self, what: &str) -> Error {
        self.frame
            .corrupt(what, "a place within the body", "one outside")
    }

    fn number(&self, base: u64, i: u64, bytes: u64) -> Option<u64> {
        let at = usize::try_from(base.checked_add(i.checked_mul(bytes)?)?).ok()?;
        match bytes {
            4 => u32_at(self.frame.body(), at).map(u64::from),
            _ => u64_at(self.frame.body(), at),
        }
    }

    fn at(&self, position: u64) -> Result<IdRef<'_>> {
        if position >= self.count {
            return Err(self.outside("order"));
        }
        if self.layout.id_type == IdType::U64 {
            let id = self
                .number(0, position, 8)
                .ok_or_else(|| self.outside("id"))?;
            return Ok(IdRef::U64(id));
        }
        let offset = |i| self.number(0, i, self.layout.offset_bytes);
        let range = offset(position).zip(offset(position + 1));
        let (start, end) = range.ok_or_else(|| self.outside("offsets"))?;
        let length = end
            .checked_sub(start)
            .ok_or_else(|| self.outside("offsets"))?;
        let start = start
            .checked_add(self.layout.blob)
            .filter(|s| {
                s.checked_add(length)
                    .is_some_and(|end| end <= self.layout.order)
            })
            .ok_or_else(|| self.outside("offsets"))?;
        self.frame
            .section(start, length, "offsets")
            .map(IdRef::Bytes)
    }

    /// The position that is `rank`-th in the order of ids.
    fn ranked(&self, rank: u64) -> Result<u64> {
        match self.layout.order_bytes {
            0 => Ok(rank),
            bytes => self
                .number(self.layout.order, rank, bytes)
                .ok_or_else(|| self.outside("order")),
        }
    }

    /// The id of a docno of this range.
    pub fn id(&self, docno: u64) -> Result<Option<DocumentId>> {
        let Some(position) = docno.checked_sub(self.first).filter(|i| *i < self.count) else {
            return Ok(None);
        };
        match self.at(position)? {
            IdRef::U64(id) => Ok(Some(DocumentId::U64(id))),
            IdRef::Bytes(id) => match std::str::from_utf8(id) {
                Ok(id) => Ok(Some(DocumentId::String(id.to_owned()))),
                Err(e) => Err(self.frame.corrupt("id", "UTF-8", e)),
            },
        }
    }

    /// The newest docno that has this id and is alive.
    pub fn find(&self, id: &DocumentId, is_dead: impl Fn(u64) -> bool) -> Result<Option<u64>> {
        let id = IdRef::from(id);
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.at(self.ranked(middle)?)? <= id {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        // A document that was replaced within one commit has several positions, side by side.
        while low > 0 {
            low -= 1;
            let position = self.ranked(low)?;
            if self.at(position)? != id {
                break;
            }
            let docno = self.first.saturating_add(position);
            if !is_dead(docno) {
                return Ok(Some(docno));
            }
        }
        Ok(None)
    }

    /// Checksums, the order, and that every id is one.
    pub fn verify(&self) -> Result<()> {
        self.frame.verify()?;
        for docno in self.first..self.end() {
            self.id(docno)?;
        }
        let mut before: Option<(IdRef<'_>, u64)> = None;
        for rank in 0..self.count {
            let position = self.ranked(rank)?;
            let here = (self.at(position)?, position);
            if before.is_some_and(|b| b.cmp(&here) != Ordering::Less) {
                return Err(self.frame.corrupt(
                    "order",
                    "ascending ids",
                    format!("another at {rank}"),
                ));
            }
            before = Some(here);
        }
        Ok(())
    }
}

/// Writes the ids of the docnos from `first` on.
pub fn write_ids(
    dir: &Directory,
    name: &str,
    id_type: IdType,
    first: u64,
    ids: &[&DocumentId],
) -> Result<Digest> {
    let count = ids.len() as u64;
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by(|a, b| ids.get(*a).cmp(&ids.get(*b)));
    let ascending = order.is_sorted();
    let blob_length: usize = ids
        .iter()
        .map(|id| match id {
            DocumentId::String(s) => s.len(),
            DocumentId::U64(_) => 0,
        })
        .sum();
    let layout = Layout::of(id_type, count, blob_length as u64, ascending)
        .ok_or_else(|| Error::invalid("too many ids for one segment"))?;
    let fields = FieldsWriter::new()
        .u64(first)
        .u64(count)
        .u64(u64::from(id_type == IdType::String))
        .u64(blob_length as u64)
        .u64(u64::from(ascending));
    let mut frame = FrameWriter::create(dir, name, Kind::Ids)?;
    let number = |n: u64, bytes: u64, out: &mut Vec<u8>| match bytes {
        4 => out.extend_from_slice(&(n as u32).to_le_bytes()),
        _ => out.extend_from_slice(&n.to_le_bytes()),
    };
    let mut out = Vec::new();
    let mut blob = Vec::with_capacity(blob_length);
    for id in ids {
        match id {
            DocumentId::U64(id) => number(*id, 8, &mut out),
            DocumentId::String(id) => {
                number(blob.len() as u64, layout.offset_bytes, &mut out);
                blob.extend_from_slice(id.as_bytes());
            }
        }
    }
    if id_type == IdType::String {
        number(blob.len() as u64, layout.offset_bytes, &mut out);
    }
    frame.write(&out)?;
    frame.write(&blob)?;
    if !ascending {
        out.clear();
        for position in order {
            number(position as u64, layout.order_bytes, &mut out);
        }
        frame.write(&out)?;
    }
    frame.finish(fields)
}

#[derive(Debug)]
pub struct IdsChunk(IdType, Vec<DocumentId>);
impl IdsChunk {
    pub fn new(t: IdType) -> Self {
        Self(t, Vec::new())
    }
    pub fn push(&mut self, id: &DocumentId) {
        self.1.push(id.clone());
    }
    pub fn len(&self) -> usize {
        self.1.len()
    }
    pub fn bytes(&self) -> usize {
        self.1.len() * 50
    }
    pub fn write(&self, dir: &Directory, name: &str, first: u64) -> Result<Digest> {
        let refs: Vec<&DocumentId> = self.1.iter().collect();
        write_ids(dir, name, self.0, first, &refs)
    }
}
pub fn join_ids(
    dir: &Directory,
    name: &str,
    segments: &[&IdSegment],
    _keep: &(dyn Fn(u64) -> bool + Sync),
) -> Result<Digest> {
    let mut all = Vec::new();
    for s in segments {
        for d in s.first()..s.end() {
            if let Some(id) = s.id(d)? {
                all.push(id);
            }
        }
    }
    let refs: Vec<&DocumentId> = all.iter().collect();
    let t = segments[0].layout.id_type;
    write_ids(dir, name, t, segments[0].first, &refs)
}
pub fn duplicates(
    segments: &[&IdSegment],
    found: &mut dyn FnMut(&DocumentId, &[u64]) -> Result<()>,
) -> Result<()> {
    let mut all: std::collections::BTreeMap<DocumentId, Vec<u64>> = Default::default();
    for s in segments {
        for d in s.first()..s.end() {
            if let Some(id) = s.id(d)? {
                all.entry(id).or_default().push(d);
            }
        }
    }
    for (id, docnos) in all {
        if docnos.len() > 1 {
            found(&id, &docnos)?;
        }
    }
    Ok(())
}

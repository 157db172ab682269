//! A route segment: the records of a range of docnos, each found by rank in O(1).
//!
//! Body: unless every docno of the range has a route, a presence bitmap (blocks of 512 bits) and a rank
//! directory (for each block the number of routes before it); then the records, all of one width.

use std::fmt;
use std::sync::Arc;

use crate::error::Result;
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind, u64_at};
use crate::routes::codec::Codec;
use crate::routes::scales::Scales;

const BLOCK_BITS: u64 = 512;
const BLOCK_BYTES: u64 = BLOCK_BITS / 8;
const NO_HASH: [u8; 32] = [0; 32];

/// Where things are in the body.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// 0 if every docno of the range has a route.
    blocks: u64,
    directory: u64,
    records: u64,
    body: u64,
}

impl Layout {
    fn of(count: u64, rows: u64, width: u64) -> Option<Self> {
        let blocks = if rows == count {
            0
        } else {
            count.div_ceil(BLOCK_BITS)
        };
        let directory = blocks.checked_mul(BLOCK_BYTES)?;
        let records =
            directory.checked_add(blocks.checked_mul(8)?.checked_next_multiple_of(64)?)?;
        let body = records.checked_add(rows.checked_mul(width)?)?;
        Some(Self {
            blocks,
            directory,
            records,
            body,
        })
    }
}

pub struct RouteSegment {
    frame: Frame,
    codec: Arc<dyn Codec>,
    scales: Option<Arc<Scales>>,
    first: u64,
    count: u64,
    rows: u64,
    layout: Layout,
}

impl fmt::Debug for RouteSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouteSegment")
            .field("file", &self.frame.path())
            .field("codec", &self.codec)
            .field("first", &self.first)
            .field("count", &self.count)
            .field("rows", &self.rows)
            .finish()
    }
}

impl RouteSegment {
    /// `decoder` is the hash of the decoder of the store; `find_scales` gives the scales with a hash.
    pub fn open(
        map: Mapped,
        name: &str,
        codec: Arc<dyn Codec>,
        decoder: Option<[u8; 32]>,
        find_scales: impl FnOnce(&[u8; 32]) -> Option<Arc<Scales>>,
    ) -> Result<Self> {
        let frame = Frame::open(map, Kind::Routes)?;
        let mut fields = frame.fields();
        let (first, count, rows, width) =
            (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
        let (its_codec, its_decoder, its_scales) = (fields.name()?, fields.hash()?, fields.hash()?);
        if its_codec != name {
            return Err(frame.corrupt("codec", name, its_codec));
        }
        if width != codec.record_bytes() as u64 {
            return Err(frame.corrupt("record width", codec.record_bytes(), width));
        }
        if first.checked_add(count).is_none() || rows > count {
            let found = format!("{rows} rows for {count} docnos from {first}");
            return Err(frame.corrupt("docno range", "a range that holds its rows", found));
        }
        let layout = Layout::of(count, rows, width)
            .filter(|l| l.body == frame.body().len() as u64)
            .ok_or_else(|| {
                let found = format!("{} bytes", frame.body().len());
                frame.corrupt("body", format!("{rows} records of {width} bytes"), found)
            })?;
        if its_decoder != decoder.unwrap_or(NO_HASH) {
            return Err(frame.corrupt("decoder", "the decoder of the store", "another"));
        }
        let scales = match codec.scaled() {
            false => None,
            true => match find_scales(&its_scales) {
                Some(scales) => Some(scales),
                None => {
                    return Err(frame.corrupt(
                        "scales",
                        "scales that the manifest lists",
                        "others",
                    ));
                }
            },
        };
        Ok(Self {
            codec,
            scales,
            first,
            count,
            rows,
            layout,
            frame,
        })
    }

    pub fn first(&self) -> u64 {
        self.first
    }

    /// The docno after the last of the range; not above `u64::MAX`, as `open` has checked.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.count)
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    fn rank_before(&self, block: u64) -> Option<u64> {
        let at = self.layout.directory.checked_add(block.checked_mul(8)?)?;
        u64_at(self.frame.body(), usize::try_from(at).ok()?)
    }

    fn word(&self, i: u64) -> Option<u64> {
        u64_at(self.frame.body(), usize::try_from(i.checked_mul(8)?).ok()?)
    }

    /// The row of a docno, if it has one.
    fn row(&self, docno: u64) -> Result<Option<u64>> {
        let Some(i) = docno.checked_sub(self.first).filter(|i| *i < self.count) else {
            return Ok(None);
        };
        if self.layout.blocks == 0 {
            return Ok(Some(i));
        }
        let rank = || -> Option<Option<u64>> {
            let (word, bit) = (i / 64, 1u64 << (i % 64));
            let here = self.word(word)?;
            if here & bit == 0 {
                return Some(None);
            }
            let block = i / BLOCK_BITS;
            let mut rank = self.rank_before(block)?;
            for before in block * (BLOCK_BITS / 64)..word {
                rank = rank.checked_add(u64::from(self.word(before)?.count_ones()))?;
            }
            rank.checked_add(u64::from((here & (bit - 1)).count_ones()))
                .map(Some)
        };
        match rank() {
            Some(Some(row)) if row < self.rows => Ok(Some(row)),
            Some(None) => Ok(None),
            _ => {
                let expected = format!("a row below {}", self.rows);
                Err(self.frame.corrupt(
                    "rank directory",
                    expected,
                    format!("another for docno {docno}"),
                ))
            }
        }
    }

    pub fn contains(&self, docno: u64) -> Result<bool> {
        Ok(self.row(docno)?.is_some())
    }

    /// Decodes the row of a docno into `out` (as many numbers as the codec has columns); false if it has none.
    pub fn read(&self, docno: u64, out: &mut [f32]) -> Result<bool> {
        let Some(row) = self.row(docno)? else {
            return Ok(false);
        };
        let width = self.codec.record_bytes() as u64;
        // No overflow: all rows lie in the body.
        let record = self
            .frame
            .section(self.layout.records + row * width, width, "record")?;
        let scales = self.scales.as_ref().map_or(&[][..], |s| s.values());
        self.codec.decode(record, scales, out);
        Ok(true)
    }

    /// Checksums, and that bitmap, directory and number of rows agree.
    pub fn verify(&self) -> Result<()> {
        self.frame.verify()?;
        let mut rows = 0u64;
        for block in 0..self.layout.blocks {
            if self.rank_before(block) != Some(rows) {
                return Err(self.frame.corrupt(
                    "rank directory",
                    rows,
                    format!("another at block {block}"),
                ));
            }
            for i in 0..BLOCK_BITS / 64 {
                let word = block * (BLOCK_BITS / 64) + i;
                let bits = self.word(word).unwrap_or_default();
                let used = self.count.saturating_sub(word * 64).min(64);
                if used < 64 && bits >> used != 0 {
                    return Err(self.frame.corrupt(
                        "presence bitmap",
                        "no bit after the range",
                        "one",
                    ));
                }
                rows += u64::from(bits.count_ones());
            }
        }
        if self.layout.blocks > 0 && rows != self.rows {
            return Err(self
                .frame
                .corrupt("presence bitmap", format!("{} bits", self.rows), rows));
        }
        Ok(())
    }
}

/// What the header of a new segment says.
#[derive(Debug)]
pub struct SegmentPlan<'p> {
    pub codec: &'p dyn Codec,
    pub codec_name: &'p str,
    pub first: u64,
    pub decoder: Option<[u8; 32]>,
    /// The values and the hash of the scales, for codecs that have them.
    pub scales: Option<(&'p [f32], [u8; 32])>,
}

/// Writes a segment of the docnos from `plan.first` on, those without a route as `None`.
pub fn write_segment(
    dir: &Directory,
    name: &str,
    plan: &SegmentPlan<'_>,
    routes: &[Option<&[f32]>],
) -> Result<Digest> {
    let count = routes.len() as u64;
    let rows = routes.iter().flatten().count() as u64;
    let width = plan.codec.record_bytes() as u64;
    let layout = Layout::of(count, rows, width)
        .ok_or_else(|| crate::Error::invalid("too many routes for one segment"))?;
    let (scales, scales_hash) = plan.scales.unwrap_or((&[], NO_HASH));
    let fields = FieldsWriter::new()
        .u64(plan.first)
        .u64(count)
        .u64(rows)
        .u64(width)
        .name(plan.codec_name)
        .bytes(&plan.decoder.unwrap_or(NO_HASH))
        .bytes(&scales_hash);
    let mut frame = FrameWriter::create(dir, name, Kind::Routes, fields, layout.body)?;
    if layout.blocks > 0 {
        frame.write(&presence(routes, layout))?;
    }
    let mut record = Vec::with_capacity(plan.codec.record_bytes());
    for row in routes.iter().flatten() {
        record.clear();
        plan.codec.encode(row, scales, &mut record);
        frame.write(&record)?;
    }
    frame.finish()
}

/// Bitmap and rank directory, with their padding.
fn presence(routes: &[Option<&[f32]>], layout: Layout) -> Vec<u8> {
    let mut bitmap = Vec::with_capacity(layout.directory as usize);
    let mut directory = Vec::new();
    let mut rank = 0u64;
    for block in routes.chunks(BLOCK_BITS as usize) {
        directory.extend_from_slice(&rank.to_le_bytes());
        for bits in block.chunks(64) {
            let word = bits.iter().enumerate().fold(0u64, |word, (i, route)| {
                word | u64::from(route.is_some()) << i
            });
            rank += u64::from(word.count_ones());
            bitmap.extend_from_slice(&word.to_le_bytes());
        }
        bitmap.resize(bitmap.len().next_multiple_of(BLOCK_BYTES as usize), 0);
    }
    bitmap.extend_from_slice(&directory);
    bitmap.resize(layout.records as usize, 0);
    bitmap
}

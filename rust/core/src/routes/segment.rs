//! A route segment: the records of a range of docnos, each found by rank in O(1).
//!
//! Body: the records, all of one width; then, unless every docno of the range has a route, their
//! [`Presence`].

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind};
use crate::manifest::Hash;
use crate::presence::{Presence, PresenceBuilder};
use crate::routes::codec::Codec;
use crate::routes::scales::{ScaleValues, Scales};
use crate::watch::Progress;

const NO_HASH: [u8; 32] = [0; 32];
/// What follows the records begins at a multiple of it.
const ALIGNMENT: u64 = 64;

pub struct RouteSegment {
    frame: Frame,
    codec: Arc<dyn Codec>,
    scales: Option<Arc<Scales>>,
    scales_hash: Hash,
    first: u64,
    count: u64,
    rows: u64,
    presence: Presence,
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
        let records = rows
            .checked_mul(width)
            .and_then(|n| n.checked_next_multiple_of(ALIGNMENT))
            .filter(|records| {
                let presence = Presence::length(count, rows);
                presence.and_then(|n| n.checked_add(*records)) == Some(frame.body().len() as u64)
            })
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
            scales_hash: Hash(its_scales),
            first,
            count,
            rows,
            presence: Presence::new(records, count, rows),
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

    /// The row of a docno, if it has one.
    fn row(&self, docno: u64) -> Result<Option<u64>> {
        match docno.checked_sub(self.first) {
            Some(i) => self.presence.row(&self.frame, i),
            None => Ok(None),
        }
    }

    pub fn contains(&self, docno: u64) -> Result<bool> {
        Ok(self.row(docno)?.is_some())
    }

    /// The record of a docno, if it has one.
    pub fn record(&self, docno: u64) -> Result<Option<&[u8]>> {
        let Some(row) = self.row(docno)? else {
            return Ok(None);
        };
        let width = self.codec.record_bytes() as u64;
        // No overflow: all rows lie in the body.
        self.frame.section(row * width, width, "record").map(Some)
    }

    /// The scales of its records, and their hash.
    pub fn scales(&self) -> Option<(Hash, &ScaleValues)> {
        Some((self.scales_hash, self.scales.as_ref()?.values()))
    }

    pub fn docnos(&self) -> Range<u64> {
        self.first..self.end()
    }

    /// Decodes the row of a docno into `out` (as many numbers as the codec has columns); false if it has none.
    pub fn read(&self, docno: u64, out: &mut [f32]) -> Result<bool> {
        let Some(record) = self.record(docno)? else {
            return Ok(false);
        };
        let scales = self.scales.as_ref().map(|s| s.values());
        self.codec
            .decode(record, scales.unwrap_or(ScaleValues::none()), out);
        Ok(true)
    }

    /// Checksums, and that bitmap, directory and number of rows agree.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.frame.verify(progress)?;
        self.presence.verify(&self.frame)
    }
}

/// What the tail of a new segment says.
#[derive(Debug, Clone)]
pub struct SegmentPlan {
    pub codec_name: String,
    /// Bytes of a record.
    pub width: usize,
    pub first: u64,
    /// The hash of the decoder, and of the scales, for codecs that have them.
    pub decoder: Option<[u8; 32]>,
    pub scales: Option<[u8; 32]>,
}

/// Writes a segment of the docnos from `plan.first` on, one after the other.
#[derive(Debug)]
pub struct SegmentWriter {
    plan: SegmentPlan,
    frame: FrameWriter,
    presence: PresenceBuilder,
}

impl SegmentWriter {
    pub fn create(dir: &Directory, name: &str, plan: SegmentPlan) -> Result<Self> {
        Ok(Self {
            frame: FrameWriter::create(dir, name, Kind::Routes)?,
            presence: PresenceBuilder::default(),
            plan,
        })
    }

    /// The next docnos have these records.
    pub fn write(&mut self, records: &[u8]) -> Result<()> {
        if !records.len().is_multiple_of(self.plan.width) {
            return Err(Error::invalid("routes: a record is not whole"));
        }
        self.frame.write(records)?;
        self.presence
            .extend_present((records.len() / self.plan.width) as u64);
        Ok(())
    }

    /// The next `n` docnos have none.
    pub fn skip(&mut self, n: u64) {
        self.presence.extend_absent(n);
    }

    pub fn plan(&self) -> &SegmentPlan {
        &self.plan
    }

    /// The docno that comes next.
    pub fn end(&self) -> u64 {
        self.plan.first.saturating_add(self.presence.count())
    }

    pub fn finish(mut self) -> Result<Digest> {
        self.frame.pad(ALIGNMENT)?;
        self.frame.write(&self.presence.to_bytes())?;
        let fields = FieldsWriter::new()
            .u64(self.plan.first)
            .u64(self.presence.count())
            .u64(self.presence.rows())
            .u64(self.plan.width as u64)
            .name(&self.plan.codec_name)
            .bytes(&self.plan.decoder.unwrap_or(NO_HASH))
            .bytes(&self.plan.scales.unwrap_or(NO_HASH));
        self.frame.finish(fields)
    }
}

//! The docnos that were deleted or replaced.

use roaring::RoaringTreemap;

use crate::error::{Error, Result};
use crate::files::{Digest, Directory, Mapped};
use crate::frame::{FieldsWriter, Frame, FrameWriter, Kind};
use crate::watch::Progress;

#[derive(Debug, Default, Clone)]
pub struct Dead {
    docnos: RoaringTreemap,
    frame: Option<Frame>,
}

impl Dead {
    /// Only docnos below `end` may be dead.
    pub fn open(map: Mapped, end: u64) -> Result<Self> {
        let frame = Frame::open(map, Kind::Dead)?;
        let declared = frame.fields().u64()?;
        let mut body = frame.body();
        // The checked form: it allocates as it reads and validates what it read.
        let docnos = RoaringTreemap::deserialize_from(&mut body)
            .map_err(|e| frame.corrupt("bitmap", "a roaring treemap", e))?;
        if !body.is_empty()
            || docnos.len() != declared
            || docnos.max().is_some_and(|max| max >= end)
        {
            let found = format!("{} of them, and {} more bytes", docnos.len(), body.len());
            return Err(frame.corrupt("bitmap", format!("{declared} docnos below {end}"), found));
        }
        let frame = Some(frame);
        Ok(Self { docnos, frame })
    }

    pub fn write(dir: &Directory, name: &str, docnos: &RoaringTreemap) -> Result<Digest> {
        let mut body = Vec::with_capacity(docnos.serialized_size());
        docnos
            .serialize_into(&mut body)
            .map_err(|e| Error::io(dir.path_of(name), e))?;
        let fields = FieldsWriter::new().u64(docnos.len());
        let mut frame = FrameWriter::create(dir, name, Kind::Dead)?;
        frame.write(&body)?;
        frame.finish(fields)
    }

    pub fn contains(&self, docno: u64) -> bool {
        self.docnos.contains(docno)
    }

    pub fn docnos(&self) -> &RoaringTreemap {
        &self.docnos
    }

    pub fn verify(&self) -> Result<()> {
        let verify = |frame: &Frame| frame.verify(&Progress::unseen());
        self.frame.as_ref().map_or(Ok(()), verify)
    }
}
